"""grace_ext: gradient compression by name, for data-parallel training on slow networks.

    import grace_ext
    g = grace_ext.grace("topk(ratio=0.01) + residual @ allgather")

`import grace_ext` imports no framework; see grace_ext.frameworks.torch for the drop-in of horovod.torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import communicators, compressors, memories, policies
from ._version import __version__ as __version__
from .composition.grace import Grace
from .composition.making import grace
from .composition.porting import from_params
from .errors import GraceError

if TYPE_CHECKING:
    from .checkpoints.checkpoint import load, save
    from .cluster import LocalCluster

__all__ = [
    "Grace", "GraceError", "LocalCluster", "communicators", "compressors", "from_params", "grace", "load", "memories", "policies", "save",
]  # fmt: skip


def __getattr__(name: str):
    # These need numpy, which a plain import should not pay for.
    if name == "LocalCluster":
        from .cluster import LocalCluster

        return LocalCluster
    if name in ("load", "save"):
        from .checkpoints import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
