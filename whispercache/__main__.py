"""
The command ``whispercache``, as ``python -m whispercache``.
"""

import sys

from .cli.main import script

if __name__ == "__main__":  # spawned children import this module, and run nothing
    sys.exit(script())
