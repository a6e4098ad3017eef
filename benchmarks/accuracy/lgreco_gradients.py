"""Measures what L-GreCo's choices save on gradients of real training: bytes and total error, compared with the uniform choice.

    python benchmarks/accuracy/lgreco_gradients.py [--steps 60] [--seed 0] [--out benchmarks/results/lgreco_gradients.json]

Trains ResNet-18 on the digits of the examples (64 x 64 pixels) and the character Transformer of benchmarks/time_to_accuracy/tasks.py,
dense, on one rank, and compresses the sum of the last 10 gradients. Total error: the sum over the layers of the 2-norm of the loss,
measured by compressing (top-k) or by exact singular values (low rank), not by the policy's own tables. Bytes: what a rank hands to
collectives. Exits with 1 if a choice sends more than its target (TARGETS) or has a larger error than the uniform choice."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, interpolate

import grace_ext
from grace_ext.arrays.libraries import ops_for_framework
from grace_ext.parts.tensor import StepInfo, TensorSpec

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import torch_mnist  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common.models import ResNet18
from benchmarks.common.record import stamp
from benchmarks.time_to_accuracy.tasks import CharTransformer

WINDOW = 10
#: base -> the largest fraction of its bytes that L-GreCo may send.
TARGETS = {"topk(ratio=0.01) + residual": 0.35, "powersgd(rank=4) + residual": 0.75}


def resnet18(steps: int, seed: int) -> dict[str, np.ndarray]:
    images, labels, *_ = torch_mnist.load()
    torch.manual_seed(seed)
    model = ResNet18(classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def loss() -> torch.Tensor:
        batch = torch.randint(len(images), (32,))
        return cross_entropy(model(interpolate(images[batch].expand(-1, 3, -1, -1), size=64)), labels[batch])

    return captured(model, optimizer, loss, steps)


def transformer(steps: int, seed: int) -> dict[str, np.ndarray]:
    task = CharTransformer()
    torch.manual_seed(seed)
    model = task.make_model()

    def loss() -> torch.Tensor:
        return task.loss(model, torch.randint(task.examples(), (8,)))

    return captured(model, task.make_optimizer(model, 5e-4), loss, steps)


def captured(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Any, steps: int) -> dict[str, np.ndarray]:
    """Trains and returns the sum of the gradients of the last WINDOW steps, by parameter."""
    sums = {name: np.zeros(tuple(p.shape), np.float32) for name, p in model.named_parameters()}
    for step in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        for name, p in model.named_parameters() if step >= steps - WINDOW else ():
            sums[name] += p.grad.numpy()
    return sums


def lost(spec: TensorSpec, x: np.ndarray, leaf: Any) -> float:
    """Returns ||x - C(x)||, computed in float64."""
    compressor = leaf.parts_for(spec)[0]
    if compressor.name == "none":
        return 0.0
    if compressor.name == "powersgd":
        values = np.linalg.svd(x.reshape(x.shape[0], -1).astype(np.float64), compute_uv=False)
        return float(np.linalg.norm(values[compressor.rank :]))
    ops, info = ops_for_framework("numpy"), StepInfo(0, 0, 1, 1)
    payload, _ = compressor.compress(ops, x.reshape(-1).copy(), spec, info, {})
    return float(np.linalg.norm(x.reshape(-1).astype(np.float64) - compressor.decompress(ops, payload, spec, info)))


def compared(gradients: dict[str, np.ndarray], base: str) -> dict[str, Any]:
    """Compares L-GreCo's choices with the uniform choice: bytes, total error, and the seconds to measure and solve."""
    policy = grace_ext.grace(policy=grace_ext.policies.get("lgreco")(base=base)).policy
    ops, by_spec = ops_for_framework("numpy"), {TensorSpec(name, x.shape): x for name, x in gradients.items()}
    flat = {spec: x.reshape(-1) for spec, x in by_spec.items()}
    started = time.perf_counter()
    found = policy.solve({spec: policy.errors(ops, spec, x) for spec, x in flat.items()})
    seconds = time.perf_counter() - started
    uniform, chosen = ([policy.leaves[each.get(spec, policy.uniform)] for spec in by_spec] for each in ({}, found))
    bytes_ = [sum(leaf.nbytes(spec) for spec, leaf in zip(by_spec, leaves, strict=True)) for leaves in (uniform, chosen)]
    errors = [sum(lost(spec, x, leaf) for (spec, x), leaf in zip(by_spec.items(), leaves, strict=True)) for leaves in (uniform, chosen)]
    counts = {str(value): list(found.values()).count(number) for number, value in enumerate(policy.values)}
    return {
        "uniform_bytes": bytes_[0], "chosen_bytes": bytes_[1], "bytes_ratio": bytes_[1] / bytes_[0],
        "uniform_error": errors[0], "chosen_error": errors[1], "error_ratio": errors[1] / errors[0],
        "layers": len(by_spec), "chosen": counts, "measure_and_solve_seconds": seconds,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for model in (resnet18, transformer):
        gradients = model(options.steps, options.seed)
        results[model.__name__] = {"elements": sum(x.size for x in gradients.values())}
        for base, target in TARGETS.items():
            row = results[model.__name__][base] = {**compared(gradients, base), "target": target}
            measured = f"bytes x {row['bytes_ratio']:.3f} (at most {target})  error x {row['error_ratio']:.4f}"
            print(f"{model.__name__:<12} {base:<32} {measured}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({**stamp(), "steps": options.steps, "seed": options.seed, "results": results}, indent=1) + "\n")
    rows = [row[base] for row in results.values() for base in TARGETS]
    return int(any(row["bytes_ratio"] > row["target"] or row["error_ratio"] > 1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
