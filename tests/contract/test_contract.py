"""Every registered compressor, with knobs other than the defaults, keeps the contract that docs/extending.md offers to others."""

from grace_ext.testing import contract

from ..catalog import COMPRESSORS

TestRegistry = contract(*COMPRESSORS)
