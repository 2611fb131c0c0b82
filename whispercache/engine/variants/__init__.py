"""
Variants: copies of models in other weight types, in the user's cache directory.
"""
