"""
Audio: decoded, searched for speech, and turned into features.
"""
