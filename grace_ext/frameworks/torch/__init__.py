"""Replaces `horovod.torch`: `import grace_ext.frameworks.torch as hvd`.

It has every public name of horovod.torch, and its `DistributedOptimizer(compression=...)` also takes a Grace or a spec string. Under
horovodrun the collectives are Horovod's; under torchrun, or if Horovod is not installed, torch.distributed serves the same names (see
engine.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .engine import ENGINE as ENGINE

if TYPE_CHECKING:  # the names that both engines serve have their types from here; what Horovod alone has is Any
    from .dist.api import *  # noqa: F403

    def __getattr__(name: str) -> Any: ...

elif ENGINE == "horovod":
    from horovod.torch import *  # noqa: F403

    del elastic  # noqa: F821 (Horovod's, which the next line would take for ours)
    from . import elastic as elastic
else:
    from .dist.api import *  # noqa: F403

from ...local import post_local as post_local
from ...privacy.settings import Privacy as Privacy
from .agreement import check_agreement as check_agreement
from .ddp import compress_ddp as compress_ddp
from .ddp import ddp_comm_hook as ddp_comm_hook
from .distributed_state import DistributedState as DistributedState
from .fsdp import fsdp_hook as fsdp_hook
from .local import LocalOptimizer as LocalOptimizer
from .local import LocalSGD as LocalSGD
from .metrics import MetricsHook as MetricsHook
from .onebit_adam import OneBitAdam as OneBitAdam
from .optimizer import CompressedOptimizer as CompressedOptimizer
from .optimizer import DistributedOptimizer as DistributedOptimizer
from .optimizer import broadcast_optimizer_state as broadcast_optimizer_state
from .private import per_example_backward as per_example_backward
