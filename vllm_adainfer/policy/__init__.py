"""The decision: from a hidden state to an answer that is settled, and its bound.

Never imports vLLM.
"""
