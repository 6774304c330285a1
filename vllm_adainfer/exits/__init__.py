"""What a step does with decisions.

Never imports vLLM.
"""
