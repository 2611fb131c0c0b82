"""
Settings from outside: one table, read from arguments, variables and a TOML file.
"""
