"""What the contract suite walks: every registered part, with knobs other than the defaults, in every mix that is allowed."""

from __future__ import annotations

import grace_ext
from grace_ext.errors import IncompatiblePartsError

# Beside the bare name. A part that has no entry is tested with its defaults.
COMPRESSOR_VARIANTS = {
    "topk": ("topk(ratio=0.25)", "topk(ratio=0.25, values='fp16')", "topk(ratio=0.1, values='bf16')", "topk(ratio=1)"),
    "randomk": ("randomk(ratio=0.25)", "randomk(ratio=0.25, scale=True)", "randomk(ratio=0.25, values='fp16')"),
    "threshold": ("threshold(threshold=0.5)", "threshold(threshold=0.5, values='bf16')", "threshold(threshold=0)"),
    "qsgd": ("qsgd(bits=4)", "qsgd(levels=1000)", "qsgd(bits=2, bucket=64)", "qsgd(levels=32767)"),
    "efsignsgd": ("efsignsgd(block=64)",),
    "signsgd": ("signsgd(ties='plus')",),
    "powersgd": ("powersgd(rank=4, feedback='mean')", "powersgd(rank=1, warm_start=False)"),
}
MEMORY_VARIANTS = {"residual": ("residual(beta=0.9, gamma=0.5)",)}

COMPRESSORS = tuple(text for name in grace_ext.compressors.names() for text in (name, *COMPRESSOR_VARIANTS.get(name, ())))
MEMORIES = tuple(text for name in grace_ext.memories.names() for text in (name, *MEMORY_VARIANTS.get(name, ())))


def natural(compressor: str) -> str:
    """The communicator that a compressor gets when none is named."""
    return grace_ext.grace(f"{compressor} + none").communicator.name


def _allowed(compressor: str, communicator: str) -> bool:
    try:
        grace_ext.grace(f"{compressor} + none @ {communicator}")
    except IncompatiblePartsError:
        return False
    return True


def compositions(memories: tuple[str, ...] = MEMORIES, *, every_communicator: bool = True) -> list[str]:
    """All allowed specs, or those with the natural communicator only."""
    specs = []
    for compressor in COMPRESSORS:
        known = grace_ext.communicators.names() if every_communicator else (natural(compressor),)
        for communicator in (c for c in known if _allowed(compressor, c)):
            specs += [f"{compressor} + {memory} @ {communicator}" for memory in memories]
    return specs


ALL = compositions()
NATURAL = compositions(every_communicator=False)
EXACT_VALUES = ("none", "fp16", "bf16", "topk", "randomk", "threshold")  # what they leave behind is representable
