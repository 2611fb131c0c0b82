"""
Calls on a model: parameters, languages and audio, checked before a lease is taken.
"""
