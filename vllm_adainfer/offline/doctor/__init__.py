"""The doctor: can this installation serve this artifact?"""
