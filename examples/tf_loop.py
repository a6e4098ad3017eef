"""Trains in a custom TensorFlow loop with compressed gradients: tf.function, GradientTape, tf.Variables, no Keras.

    horovodrun -np 2 python examples/tf_loop.py --compression "topk(ratio=0.01) + residual"

The model is softmax regression on MNIST. The lines that end in `# +` distribute and compress the training.
"""

from __future__ import annotations

import argparse

import numpy as np
import tensorflow as tf
from keras_mnist import load

import grace_ext  # +
import grace_ext.frameworks.tensorflow as hvd  # +


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", default="topk(ratio=0.01) + residual", metavar="SPEC", help="spec; 'none' for dense")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="batch size per rank")
    parser.add_argument("--lr", type=float, default=0.05)
    options = parser.parse_args()
    hvd.init()  # +
    g = grace_ext.grace(options.compression)  # + made once, because it keeps the memory

    images, labels, test_images, test_labels = load()
    weights, bias = tf.Variable(tf.zeros((784, 10)), name="weights"), tf.Variable(tf.zeros(10), name="bias")
    hvd.broadcast_variables([weights, bias], root_rank=0)  # +
    images, labels = images.reshape(len(images), -1), labels.astype(np.int64)
    order = np.random.default_rng(0)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = x @ weights + bias
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        tape = hvd.DistributedGradientTape(tape, compression=g)  # +
        for variable, gradient in zip((weights, bias), tape.gradient(loss, [weights, bias]), strict=True):
            variable.assign_sub(options.lr * gradient)
        return loss

    for epoch in range(options.epochs):
        mine = order.permutation(len(images))[hvd.rank() :: hvd.size()]  # +
        batches = mine[: len(mine) // options.batch_size * options.batch_size].reshape(-1, options.batch_size)
        losses = [float(step(images[batch], labels[batch])) for batch in batches]
        if hvd.rank() == 0:  # +
            guesses = np.argmax(test_images.reshape(len(test_images), -1) @ weights.numpy() + bias.numpy(), axis=1)
            accuracy = 100 * np.mean(guesses == test_labels)
            print(f"epoch {epoch + 1}/{options.epochs}  loss {np.mean(losses):.4f}  accuracy {accuracy:.2f}%", flush=True)


if __name__ == "__main__":
    main()
