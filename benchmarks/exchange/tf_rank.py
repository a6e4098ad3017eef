"""Runs one TensorFlow rank of exchange.py; horovodrun starts it.  tf_rank.py JOB.json

The exchange runs inside a tf.function: with a spec, through DistributedGradientTape over a tape whose gradients are given; without one, by
a plain Horovod all-reduce of each gradient.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import timing


class World:
    def __init__(self) -> None:
        horovod.init()
        self.rank, self.size = horovod.rank(), horovod.size()

    def barrier(self) -> None:
        self.largest(0.0)  # Horovod has no barrier for TensorFlow

    def largest(self, value: float) -> float:
        return float(tf.reduce_max(horovod.allgather(tf.constant([value], tf.float64), name="largest")))


class HandOut:
    """Stands in for a tf.GradientTape and returns the given gradients."""

    def __init__(self, gradients: list[tf.Tensor]):
        self.gradients = gradients

    def gradient(self, target: Any, sources: Any, output_gradients: Any = None) -> list[tf.Tensor]:
        return self.gradients


class Exchange:
    has_baseline = False
    warmups, least_warmups = 2, 1

    def __init__(self, job: dict[str, Any], world: World):
        self.job, self.world = job, world
        self.names = list(job["shapes"])
        self.variables = [tf.Variable(tf.zeros(job["shapes"][name]), name=name.replace(".", "_")) for name in self.names]
        self.generator = tf.random.Generator.from_seed(1000 + world.rank)
        self.gradients: list[tf.Tensor] = []
        self.given: list[tf.Tensor] = []

    def make(self) -> None:
        spec = self.job["argument"]
        if spec:
            import grace_ext
            import grace_ext.frameworks.tensorflow as hvd

            g = grace_ext.grace(spec)

            def step(gradients: list[tf.Tensor]) -> list[tf.Tensor]:
                return hvd.DistributedGradientTape(HandOut(gradients), compression=g).gradient(None, self.variables)
        else:

            def step(gradients: list[tf.Tensor]) -> list[tf.Tensor]:
                named = zip(self.names, gradients, strict=True)
                return [horovod.allreduce(x, name=name.replace(".", "_"), op=horovod.Average) for name, x in named]

        self.step = tf.function(step, autograph=False)

    def fresh(self) -> None:
        self.gradients = []
        shapes, scales = self.job["shapes"], self.job["scales"]
        self.given = [self.generator.normal(shapes[name], 0.0, scales[name]) for name in self.names]

    def exchange(self) -> None:
        self.gradients, self.given = self.step(self.given), []

    def baseline(self) -> None:
        raise NotImplementedError

    def settle(self) -> None:
        pass

    def results(self) -> Iterator[np.ndarray]:
        return (gradient.numpy() for gradient in self.gradients)

    def facts(self) -> dict[str, Any]:
        return {}


def main() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    world = World()
    system = Exchange(job, world)
    system.fresh()
    before = timing.trimmed()
    system.make()
    seen = timing.run(world, system, before=before, budget=job["budget"])
    (Path(job["out"]) / f"rank{world.rank}.json").write_text(json.dumps(seen))
    world.barrier()
    horovod.shutdown()


if __name__ == "__main__":
    main()
