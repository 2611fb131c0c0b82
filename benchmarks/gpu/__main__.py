"""
Runs the GPU benchmark: ``python benchmarks/gpu``.
"""

from __future__ import annotations

import sys
from pathlib import Path

# In place of this folder, whose files are modules of a package.
sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu.command import main  # noqa: E402 - the path comes first

if __name__ == "__main__":
    sys.exit(main())
