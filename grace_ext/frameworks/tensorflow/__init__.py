"""Drop-in for `horovod.tensorflow`: `import grace_ext.frameworks.tensorflow as hvd`. Keras 3 included.

Every public name of horovod.tensorflow, with `DistributedOptimizer` (Keras 3) and `DistributedGradientTape` taking a Grace or a spec
string as `compression=`, `broadcast_variables` taking Keras 3 variables, and `callbacks`. The collectives are Horovod's.
"""

from __future__ import annotations

import os

from ...errors import UnsupportedError
from .. import launchers
from ..horovod import limit_waits

if not any(name in os.environ for name in ("HOROVOD_RANK", "HOROVOD_CONTROLLER", *launchers.MPI)):
    # Plain python: a Horovod that was built with MPI would otherwise try to start it, and abort.
    os.environ["HOROVOD_CONTROLLER"] = os.environ["HOROVOD_CPU_OPERATIONS"] = "gloo"
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1":
        raise UnsupportedError(
            "torchrun started this process, and TensorFlow's collectives come from Horovod, for which it would be alone: it would train on "
            "its share and reduce nothing. Use horovodrun or mpirun"
        )

limit_waits()

try:
    from horovod.tensorflow import *  # noqa: F403
except ImportError as error:
    _missing = error

    def __getattr__(name: str):
        raise UnsupportedError(
            f"hvd.{name}: TensorFlow's collectives come from Horovod, which is not installed, or not built for this TensorFlow "
            f"({_missing}): run `make horovod` (python tools/build_horovod.py)"
        )
else:
    from ...local import post_local as post_local

    del elastic  # noqa: F821 (Horovod's, which the next line would take for ours)
    from . import callbacks as callbacks
    from . import elastic as elastic
    from .agreement import check_agreement as check_agreement
    from .callbacks import broadcast_variables as broadcast_variables
    from .local import LocalSGD as LocalSGD
    from .optimizer import DistributedOptimizer as DistributedOptimizer
    from .tape import DistributedGradientTape as DistributedGradientTape
    from .tape import PartialDistributedGradientTape as PartialDistributedGradientTape
