"""Resumes training with TensorFlow: the Keras optimizer by grace_ext.save and by tf.train.Checkpoint, the tape, bind, LocalSGD. See
resume_steps.py; KIND is <api>:<spec>."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parent))
import resume_steps as steps  # noqa: E402

import grace_ext  # noqa: E402
import grace_ext.frameworks.tensorflow as hvd  # noqa: E402
from tests.frameworks.support import tf_training as problem  # noqa: E402

tf.config.threading.set_intra_op_parallelism_threads(1)


class Job:
    knows_parameters = False

    def __init__(self, kind: str):
        self.api, name = kind.split(":")
        self.knows_parameters = self.api == "bind"
        self.dtype = "bfloat16" if name == "bf16" else "float32"
        self.g = grace_ext.grace(steps.SPECS[name])
        if self.api in ("tape", "bind"):
            self.variables = problem.tf_variables()
        else:
            self.variables = [keras.Variable(w, name=n, dtype=self.dtype) for n, w in zip(problem.SHAPES, problem.initial(), strict=True)]
        if self.api == "tape":
            self.holder = hvd.DistributedGradientTape(tf.GradientTape(), compression=self.g).memory(self.variables)
        elif self.api == "bind":
            self.holder = self.g.bind(self.variables)
        else:
            plain = keras.optimizers.SGD(problem.LR, momentum=0.9)
            wrap = hvd.LocalSGD if self.api == "local" else hvd.DistributedOptimizer
            self.optimizer = self.holder = wrap(plain, compression=self.g, **({"every": 5} if self.api == "local" else {}))
            self.optimizer.build(self.variables)
        self.apply = tf.function(self._apply, autograph=False)

    def _apply(self, *gradients):
        self.optimizer.apply(list(gradients), self.variables)

    def step(self, i: int) -> None:
        if self.api in ("tape", "bind"):
            self._step_by_tape(i)
        else:
            gradients = problem.gradients_of([tf.cast(v.value, tf.float32) for v in self.variables], hvd.rank(), i)
            self.apply(*[tf.cast(gradient, self.dtype) for gradient in gradients])

    def _step_by_tape(self, i: int) -> None:
        import horovod.tensorflow as plain

        of, compression = (hvd, self.g) if self.api == "tape" else (plain, self.holder)
        with tf.GradientTape() as tape:
            loss = problem.loss_of(self.variables, hvd.rank(), i)
        tape = of.DistributedGradientTape(tape, compression=compression)
        for v, g in zip(self.variables, tape.gradient(loss, self.variables), strict=True):
            v.assign(v - problem.LR * g)

    def arrays(self):
        return {name: np.asarray(v.numpy()) for name, v in zip(problem.SHAPES, self.variables, strict=True)}

    def memory(self):
        return self.holder.state_dict() if self.api in ("tape", "bind") else self.optimizer.grace_state_dict()

    def take(self, state):
        if self.api in ("tape", "bind"):
            self.holder.load_state_dict(state)
        else:
            self.optimizer.load_grace_state_dict(state)

    def _checkpoint(self) -> tf.train.Checkpoint:
        variables = [v if isinstance(v, tf.Variable) else v.value for v in self.variables]
        if self.api == "checkpoint":
            return tf.train.Checkpoint(variables=variables, optimizer=self.optimizer)
        own = self.optimizer.variables if self.api in ("keras", "local") else []
        return tf.train.Checkpoint(variables=variables, own=[v.value for v in own])

    def save(self, path: Path) -> None:
        self._checkpoint().write(str(path / "c"))

    def load(self, path: Path) -> None:
        self._checkpoint().read(str(path / "c")).assert_consumed()


hvd.init()
steps.run(Job, hvd.rank(), hvd.size())
hvd.shutdown()
