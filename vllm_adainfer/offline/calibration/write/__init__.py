"""Write the artifact and its model card."""
