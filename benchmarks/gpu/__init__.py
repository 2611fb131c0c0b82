"""
The benchmark of whispercache on a GPU; see `gpu.command`.
"""
