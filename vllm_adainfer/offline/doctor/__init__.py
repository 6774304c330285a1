"""Doctor: can this installation serve this artifact?"""
