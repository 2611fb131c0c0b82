"""
The command ``whispercache``.
"""
