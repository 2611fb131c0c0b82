"""
Bytes that models take on each device, predicted and measured.
"""
