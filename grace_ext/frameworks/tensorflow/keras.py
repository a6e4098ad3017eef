"""Serves scripts that were written for horovod.keras or horovod.tensorflow.keras: `import grace_ext.frameworks.tensorflow.keras as hvd`.

It has the names of grace_ext.frameworks.tensorflow."""

from __future__ import annotations

from . import *  # noqa: F403
