"""The contract that every compressor keeps, as tests for pytest: `TestMine = contract("mine", "mine(knob=2)")`.

Needs pytest, hypothesis and ml_dtypes (`pip install 'grace_ext[dev]'`). docs/extending.md shows it at work.
"""

from .contract import contract

__all__ = ["contract"]
