"""
Live views of what a cache is doing.
"""
