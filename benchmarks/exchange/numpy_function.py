#!/usr/bin/env python3
"""Times tf.numpy_function, in which TensorFlow's exchange runs, against plain operations of TensorFlow that compute the same.

    python benchmarks/exchange/numpy_function.py [--calls 50] [--arrays 161] [--mb 64] [--times 15]

Prints microseconds per call (of a scalar), per further array of a call, and per MB of an array that is negated, and how much of it numpy
takes by itself. Each is from the shortest of several runs, since other programs only make runs longer; the calls of one run follow one
another. All is on one CPU, with one thread per operation, so that no copy from or to a GPU is in these figures. Takes under a minute; needs
TensorFlow and Horovod.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from grace_ext.frameworks.tensorflow.ops import aligned, numpy_function

Step = Callable[[list[tf.Tensor]], list[tf.Tensor]]
COLUMNS = ("numpy_function", "of it numpy", "plain")


def called(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """Negates the tensors in one call. Results are in memory that TensorFlow takes over without a copy, and that is used again at the next
    run, as the exchange's memory is."""
    room = [aligned(tensor.shape.num_elements(), "float32").reshape(tensor.shape) for tensor in tensors]

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        return [np.negative(x, out=out) for x, out in zip(arrays, room, strict=True)]

    made = numpy_function(run, tensors, [tf.float32] * len(tensors))
    for tensor, before in zip(made, tensors, strict=True):
        tensor.set_shape(before.shape)
    return made


def plain(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    return [tf.negative(tensor) for tensor in tensors]


def chained(step: Step, shapes: Sequence[tuple[int, ...]], calls: int) -> Callable[[], Any]:
    """Returns a graph that makes so many steps one after another on arrays of these shapes, and returns a scalar."""
    given = [tf.Variable(tf.ones(shape)) for shape in shapes]

    @tf.function(autograph=False)
    def run() -> tf.Tensor:
        tensors = [variable.read_value() for variable in given]
        for _ in range(calls):
            with tf.control_dependencies(tensors):  # else grappler removes pairs of negations
                tensors = step([tf.identity(tensor) for tensor in tensors])
        return tf.add_n([tf.reshape(tensor, [-1])[0] for tensor in tensors])

    expected = len(shapes) * (-1.0) ** calls
    if float(run()) != expected:
        raise AssertionError(f"the graph returns {float(run())}, expected {expected}")
    return run


def by_numpy(shapes: Sequence[tuple[int, ...]], calls: int) -> Callable[[], float]:
    """Returns a function that negates arrays of these shapes so many times, into other memory, by numpy alone."""
    given = [(aligned(size, "float32"), aligned(size, "float32")) for size in (int(np.prod(shape)) for shape in shapes)]
    for one, _ in given:
        one[:] = 1

    def run() -> float:
        for _ in range(calls):
            for one, other in given:
                np.negative(one, out=other)
        return float(given[0][1][0])

    return run


def seconds(shapes: Sequence[tuple[int, ...]], calls: int, times: int) -> dict[str, float]:
    """Returns the least seconds of one step on arrays of these shapes, by each of COLUMNS."""
    made = (chained(called, shapes, calls), by_numpy(shapes, calls), chained(plain, shapes, calls))
    graphs = dict(zip(COLUMNS, made, strict=True))
    spent: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(times):
        for name, run in graphs.items():
            begin = time.perf_counter()
            float(run())
            spent[name].append((time.perf_counter() - begin) / calls)
    return {name: min(its) for name, its in spent.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=50, help="steps in one graph, for small arrays")
    parser.add_argument("--arrays", type=int, default=161, help="arrays of one call (161: the parameters of ResNet-50)")
    parser.add_argument("--mb", type=int, default=64, help="MB of the large array")
    parser.add_argument("--times", type=int, default=15, help="runs of each graph")
    options = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    one = seconds([()], options.calls, options.times)
    many = seconds([()] * options.arrays, options.calls, options.times)
    large = seconds([(options.mb * 250_000,)], 3, options.times)
    print(f"{'':24}" + "".join(f"{column:>16}" for column in COLUMNS))
    for label, of in (
        ("per call, us", lambda its: 1e6 * one[its]),
        ("per further array, us", lambda its: 1e6 * (many[its] - one[its]) / (options.arrays - 1)),
        ("per MB, us", lambda its: 1e6 * (large[its] - one[its]) / options.mb),
    ):
        print(f"{label:24}" + "".join(f"{of(column):16.1f}" for column in COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
