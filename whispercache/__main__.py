"""
``python -m whispercache`` is the command ``whispercache``.
"""

import sys

from .cli.main import script

if __name__ == "__main__":  # spawned children import this module, and run nothing
    sys.exit(script())
