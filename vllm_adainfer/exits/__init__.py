"""Steps, and the effects of decisions on them.

Never imports vLLM.
"""
