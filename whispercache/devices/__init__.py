"""
Devices: what memory they have, what of it is free, and how to give it back.
"""
