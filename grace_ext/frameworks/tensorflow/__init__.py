"""Replaces `horovod.tensorflow`: `import grace_ext.frameworks.tensorflow as hvd`. Keras 3 is supported.

It has every public name of horovod.tensorflow. `DistributedOptimizer` (Keras 3) and `DistributedGradientTape` take a Grace or a spec
string as `compression=`, `broadcast_variables` takes Keras 3 variables, too, and there are `callbacks`. The collectives are Horovod's.

Compression runs on the CPU, in `tf.numpy_function`. If variables are on a GPU, each exchange copies all of their gradients to the host and
the results back, and rank 0 logs what that costs; docs/tensorflow.md says when it still pays.
"""

from __future__ import annotations

import os
from typing import Any

from ...errors import UnsupportedError
from .. import launchers
from ..horovod import limit_waits

if not any(name in os.environ for name in ("HOROVOD_RANK", "HOROVOD_CONTROLLER", *launchers.MPI)):
    # Plain python: otherwise a Horovod that was built with MPI would try to start MPI, and abort.
    os.environ["HOROVOD_CONTROLLER"] = os.environ["HOROVOD_CPU_OPERATIONS"] = "gloo"
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1":
        raise UnsupportedError(
            "torchrun started this process, but TensorFlow's collectives come from Horovod, which torchrun does not start: each rank would "
            "train on its share alone and reduce nothing. Use horovodrun or mpirun"
        )

limit_waits()

try:
    from horovod.tensorflow import *  # noqa: F403
except ImportError as error:
    _missing = error

    # For a type checker this also declares Horovod's names, which it cannot see, as Any.
    def __getattr__(name: str) -> Any:
        raise UnsupportedError(
            f"hvd.{name} needs Horovod, which is not installed, or not built for this TensorFlow ({_missing}): run `make horovod` "
            "(python tools/build_horovod.py)"
        )
else:
    from ...local import post_local as post_local
    from ...privacy.settings import Privacy as Privacy

    del elastic  # noqa: F821 (Horovod's, which the import below would take for ours)
    from . import callbacks as callbacks
    from . import elastic as elastic
    from .agreement import check_agreement as check_agreement
    from .loading import SyncBatchNormalization as SyncBatchNormalization
    from .loading import load_model as load_model
    from .local import LocalSGD as LocalSGD
    from .optimizer import DistributedOptimizer as DistributedOptimizer
    from .private import per_example_gradients as per_example_gradients
    from .tape import DistributedGradientTape as DistributedGradientTape
    from .tape import PartialDistributedGradientTape as PartialDistributedGradientTape
    from .variables import broadcast_variables as broadcast_variables
    from .watchdog import shutdown as shutdown
