"""Defines the frozen inputs, and computes the package's messages for them. Nothing here may change without a new payload version."""

from __future__ import annotations

import numpy as np

import grace_ext
from grace_ext.arrays import sampling
from grace_ext.parts import rng
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing.worlds import World, tapped

#: Every compressor whose bytes are the same in every library, with knobs that change the format.
SPECS = (
    "none @ allreduce",
    "none @ allgather",
    "fp16 + residual @ allgather",
    "bf16 + residual @ allgather",
    "topk(ratio=0.1) + residual @ allgather",
    "topk(ratio=0.4, values='fp16') + residual @ allgather",
    "topk(ratio=0.1, values='bf16') + residual @ broadcast",
    "threshold(threshold=1.5) + residual @ allgather",
    "threshold(threshold=1.5, values='fp16') + residual @ allgather",
    "randomk(ratio=0.2) + residual @ allreduce",
    "randomk(ratio=0.2, values='fp16') + residual @ allgather",
    "signsgd + residual @ allgather",
    "efsignsgd + residual @ allgather",
    "efsignsgd(block=16) + residual @ allgather",
    "qsgd + none @ allgather",
    "qsgd(bits=4, bucket=32) + none @ allgather",
    "qsgd(levels=1000, bucket=32) + none @ allgather",
    *(
        f"topk(ratio=0.1, index={index!r}) + residual @ allgather" for index in ("elias_fano", "bitmap", "golomb", "packed", "block16")
    ),
    "topk(ratio=0.1) > qsgd(bits=4) + residual @ allgather",
    "threshold(threshold=1.5) > efsignsgd + residual @ allgather",
    "topk(ratio=0.1) + residual @ reduce_scatter",
    "topk(ratio=0.1) + residual @ sparse_allreduce",
    "signsgd + none @ allreduce",
    "signsgd + none @ reduce_scatter",
    "signum + none @ allgather",
    "randblock(ratio=0.2) + residual @ allreduce",
    "dgc(ratio=0.1) + residual @ allgather",
    "sidco(ratio=0.1) + residual @ allgather",
    "global_topk(ratio=0.1) + residual @ allgather",
    "adaq(ratio=0.1) + residual @ allgather",
    "wangni(ratio=0.1) + none @ allgather",
    "strom(threshold=1.5) + residual @ allgather",
    "strom(threshold=1.5, multi=True) + residual @ allgather",
    "induced(biased=topk(ratio=0.1), rest=qsgd(bits=4)) + none @ allgather",
    "onebit + residual @ allgather",
    "terngrad + none @ allgather",
    "natural + none @ allgather",
    "natural(bits=8) + none @ allgather",
    "u8bit + none @ allgather",
    "inceptionn + residual @ allgather",
    "sketch(quantiles=16) + residual @ allgather",
    "adaqs + none @ allgather",
    "dqsgd + none @ allgather",
    "scaled_int + none @ allreduce",
    "scaled_int(width=16) + none @ allgather",
    "vqsgd(repeats=10) + none @ allgather",
)
RANKS, STEPS = 2, 2
SHAPES = {"w": (97,), "layer/m": (9, 7)}


def gradient(name: str, rank: int, step: int) -> np.ndarray:
    """Returns a gradient made by integer arithmetic: multiples of 1/64 in [-8, 8], with ties and zeros."""
    shape = SHAPES[name]
    j = np.arange(int(np.prod(shape)), dtype=np.int64)
    return (((j * j * 31 + j * 7919 + rank * 613 + step * 271 + len(name)) % 1025 - 512) / 64).astype(np.float32).reshape(shape)


def messages(world: World, spec: str) -> list[list[str]]:
    """Returns each rank's buffer, in hex, for every collective of every step, in order."""
    cluster = world.cluster(grace_ext.grace(spec), RANKS)
    with tapped() as seen:
        for step in range(STEPS):
            world.step(cluster, [{name: gradient(name, rank, step) for name in SHAPES} for rank in range(RANKS)])
    return [[buffer.hex() for buffer in collective.buffers] for collective in seen]


def generator() -> dict[str, object]:
    """Returns words, positions, normals and keys of the package's random generator."""
    info = StepInfo(step=3, rank=1, size=2, divisor=2, seed=5)
    return {
        "shared key": list(info.shared_key("layer/m", "randomk")),
        "private key": list(info.private_key("layer/m", "qsgd")),
        "key without anything": list(StepInfo(step=0, rank=0, size=1, divisor=1).shared_key("", "")),
        "words (0, 0)": rng.words((0, 0), 8).tolist(),
        "words (1, 2) from 4294967290": rng.words((1, 2), 8, start=2**32 - 6).tolist(),
        "sample (7, 8) 20 of 1000": sampling.sample((7, 8), 1000, 20).tolist(),
        "sample (7, 8) 3 of 5": sampling.sample((7, 8), 5, 3).tolist(),
        "normals (3, 4)": rng.normals((3, 4), 6).tobytes().hex(),
    }


def digests() -> dict[str, str]:
    """Returns the sizes that the formats declare."""
    g = grace_ext.grace("topk(ratio=0.1) + residual @ allgather")
    return {f"nbytes {shape}": str(g.nbytes(TensorSpec("w", shape))) for shape in ((1,), (97,), (9, 7), (100_000,))}


def everything(world: World) -> dict[str, object]:
    return {"messages": {spec: messages(world, spec) for spec in SPECS}, "generator": generator(), "sizes": digests()}
