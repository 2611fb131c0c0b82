"""
Decisions about memory as pure functions: no lock, clock, thread or file.
"""
