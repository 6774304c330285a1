"""Task suites: templates and labels as data files, and the prompts made with them."""
