"""grace_ext: gradient compression by name, for data-parallel training on slow networks.

    import grace_ext
    g = grace_ext.grace("topk(ratio=0.01) + residual @ allgather")

`import grace_ext` imports no framework; grace_ext.frameworks.torch is the drop-in replacement for horovod.torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    # These need numpy, whose import takes time; they are imported when they are first used.
    if name == "LocalCluster":
        from .cluster import LocalCluster

        return LocalCluster
    if name in ("load", "save"):
        from .checkpoints import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
