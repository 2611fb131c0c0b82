"""
Peers: other processes on the same devices, and what they tell each other.
"""
