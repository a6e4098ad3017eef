"""Runs where a launcher has started several ranks that an engine does not connect: prints what each rank is told.

The argument is numpy, numpy-local, tensorflow or tensorflow-local."""

from __future__ import annotations

import sys

import numpy as np


def use(engine: str) -> None:
    if engine == "numpy":
        import grace_ext.frameworks.numpy as gnp

        gnp.Exchange("none").step({"w": np.ones(3, np.float32)})
    elif engine == "numpy-local":
        import grace_ext.frameworks.numpy as gnp

        gnp.LocalSGD("none", every=2).start({"w": np.ones(3, np.float32)})
    else:
        import keras
        import tensorflow as tf

        import grace_ext.frameworks.tensorflow as hvd

        hvd.init()
        optimizer = keras.optimizers.SGD(0.1)
        wrapped = hvd.LocalSGD(optimizer, every=2) if engine == "tensorflow-local" else hvd.DistributedOptimizer(optimizer)
        variable = tf.Variable([1.0])
        wrapped.apply([tf.constant([1.0])], [variable])


try:
    use(sys.argv[1])
except NotImplementedError as error:
    sys.stdout.write(f"TOLD {error}\n")  # at once, so that the ranks' lines do not mix
