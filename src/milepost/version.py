"""The version, in a separate module, so that importing it does not import the package."""

from __future__ import annotations

__version__ = "0.1.0"
