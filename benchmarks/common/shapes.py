"""Describes the gradients of real models: names and shapes from the architecture, a scale for each tensor, and a matching threshold.

No model is built and nothing is downloaded: the cost of an exchange depends on shapes and on the distribution of the values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

Shapes = dict[str, tuple[int, ...]]


def resnet50() -> Shapes:
    """Returns ResNet-50's shapes for 1,000 classes (He et al. 2015; 3, 4, 6, 3 bottleneck blocks): 161 tensors, 25,557,032 elements."""
    shapes: Shapes = {}

    def convolution(name: str, out: int, into: int, side: int, norm: str) -> None:
        shapes[f"{name}.weight"] = (out, into, side, side)
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (out,)

    convolution("conv1", 64, 3, 7, "bn1")
    into = 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            at, out = f"layer{stage}.{block}", 4 * width
            convolution(f"{at}.conv1", width, into, 1, f"{at}.bn1")
            convolution(f"{at}.conv2", width, width, 3, f"{at}.bn2")
            convolution(f"{at}.conv3", out, width, 1, f"{at}.bn3")
            if block == 0:
                convolution(f"{at}.downsample.0", out, into, 1, f"{at}.downsample.1")
            into = out
    return {**shapes, **linear("fc", 1000, 2048)}


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def bert_base() -> Shapes:
    """Returns the shapes of BERT-base, uncased (Devlin et al. 2018), with its pooler and no head: 199 tensors, 109,482,240 elements."""
    d, inner, vocabulary, positions = 768, 3072, 30522, 512
    shapes: Shapes = {"embeddings.word": (vocabulary, d), "embeddings.position": (positions, d), "embeddings.type": (2, d)}
    shapes |= norm("embeddings.norm", d)
    for layer in range(12):
        at = f"encoder.{layer}"
        for part in ("query", "key", "value", "attention"):
            shapes |= linear(f"{at}.{part}", d, d)
        shapes |= norm(f"{at}.attention_norm", d)
        shapes |= linear(f"{at}.intermediate", inner, d) | linear(f"{at}.output", d, inner) | norm(f"{at}.output_norm", d)
    return shapes | linear("pooler", d, d)


def transformer(layers: int = 4, d: int = 256, vocabulary: int = 256, context: int = 256) -> Shapes:
    """Returns the shapes of a small character-level decoder, pre-norm, with an untied head: 53 tensors, 3,356,160 elements by default."""
    shapes: Shapes = {"token": (vocabulary, d), "position": (context, d)}
    for layer in range(layers):
        at = f"layer.{layer}"
        shapes |= norm(f"{at}.norm1", d) | linear(f"{at}.qkv", 3 * d, d) | linear(f"{at}.attention", d, d)
        shapes |= norm(f"{at}.norm2", d) | linear(f"{at}.up", 4 * d, d) | linear(f"{at}.down", d, 4 * d)
    return shapes | norm("norm", d) | {"head.weight": (vocabulary, d)}


def tiny() -> Shapes:
    """Returns shapes for tests of the benchmark itself: a convolution, a matrix, a bias and a scalar."""
    return {"conv.weight": (8, 4, 3, 3), "fc.weight": (96, 64), "fc.bias": (96,), "scale": ()}


MODELS = {"resnet50": resnet50, "bert-base": bert_base, "transformer": transformer, "tiny": tiny}


def elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def scales(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Returns the standard deviation of each tensor's gradient: log-normal over the tensors (layers differ by an order of magnitude), the
    same at every call."""
    drawn = np.random.default_rng(50).standard_normal(len(shapes))
    return {name: float(1e-3 * math.exp(0.7 * x)) for name, x in zip(shapes, drawn, strict=True)}


def steady_residual(threshold: float, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Draws the residual that error feedback has after long training with a threshold, float32: a random walk that restarts at 0 when it
    reaches +-threshold is at x with a density proportional to 1 - |x| / threshold."""
    uniform = generator.random((2, math.prod(shape)), np.float32)
    return (threshold * (uniform[0] + uniform[1] - 1)).reshape(shape)


def threshold_for(shapes: Mapping[str, tuple[int, ...]], kept: float = 0.01, sample: int = 20_000, steps: int = 40) -> float:
    """Returns the threshold with which error feedback, once settled, sends a fraction `kept` of all elements per step; found by simulation
    on a sample of the elements."""
    sigmas = np.array(list(scales(shapes).values()))
    weights = np.array([math.prod(shape) for shape in shapes.values()])
    generator = np.random.default_rng(51)
    sigma = generator.choice(sigmas, sample, p=weights / weights.sum())
    low, high = float(sigmas.min()), 100 * float(sigmas.max())
    for _ in range(20):
        threshold = math.sqrt(low * high)
        x, sent = steady_residual(threshold, (sample,), np.random.default_rng(52)).astype(np.float64), 0
        for step in range(steps):
            x += sigma * generator.standard_normal(sample)
            over = np.abs(x) >= threshold
            x[over] = 0
            sent += int(over.sum()) if step >= steps // 2 else 0
        low, high = (threshold, high) if sent / (sample * (steps - steps // 2)) > kept else (low, threshold)
    return float(f"{math.sqrt(low * high):.3g}")
