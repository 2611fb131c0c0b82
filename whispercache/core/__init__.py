"""
The core of a cache: who holds which model, and the one lock.
"""
