"""
Other processes on the same devices: what they tell each other, and how they yield.
"""
