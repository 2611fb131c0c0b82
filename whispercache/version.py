"""
The version of this package, for all places that show it.
"""

from __future__ import annotations

__version__ = "0.1.0"
