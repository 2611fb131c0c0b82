"""
Real WhisperModels in front of a cache: whatever a program does with one, it may do with
these.
"""
