"""Cases of Triton kernels in Triton's interpreter, on the CPU: they give the bytes of the CPU kernels and of the plain forms.

Started with TRITON_INTERPRET=1, in a process of its own: torch may import Triton, which looks at the variable then, and TensorFlow imported
before Triton may end a process. benchmarks/gpu_check.py starts it on a GPU, without the interpreter and with DEVICE=cuda:0.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

import grace_ext
from grace_ext import LocalCluster
from grace_ext.arrays import libraries
from grace_ext.arrays.compiled import CompiledOps, host_ops
from grace_ext.arrays.numpy import NumpyOps
from grace_ext.exchange import lockstep
from grace_ext.frameworks.torch.devices import ops_for
from grace_ext.frameworks.torch.ops import HostOps, TorchOps
from grace_ext.parts import rng
from grace_ext.parts.ops import Feedback
from grace_ext.testing import inputs

assert isinstance(ops_for(torch.device("cpu")), HostOps)
assert "grace_ext.frameworks.torch.triton.kernels" not in sys.modules, "a tensor on the CPU asked for Triton"

from grace_ext.frameworks.torch.triton.ops import BLOCK, TritonOps  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import run_cases  # noqa: E402

torch.set_num_threads(1)
DEVICE = os.environ.get("DEVICE", "cpu")
#: Few and small: the interpreter takes milliseconds per program.
SIZES = (1, 7, 2 * BLOCK + 1) if DEVICE == "cpu" else (1, 7, 300_017)
SPECS = (
    "efsignsgd + residual(beta=0.9)",
    "efsignsgd(block=500) + residual",
    "onebit + residual",
    "signsgd + none",
    "topk(ratio=0.05) + residual(beta=0.9)",
    "threshold(threshold=0.7) + residual",
    "qsgd(bits=4) + none",
    "qsgd(bits=3, bucket=500) + residual(beta=0.9)",
    "terngrad + none",
    "natural + none",
    "randomk(ratio=0.1) + residual",
)


class Counting(TritonOps):
    """Counts kernel launches by name, so that a case shows that it ran kernels and not the plain form."""

    def __init__(self):
        super().__init__(DEVICE)
        self.launched = set()

    def _run(self, kernel, programs, *args, **sizes):
        self.launched.add(kernel.__name__)
        super()._run(kernel, programs, *args, **sizes)


def on_device(array) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


def on_host(found):
    return found.cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)


def fits(mine, expected) -> bool:
    mine = on_host(mine)
    return mine.dtype == expected.dtype and mine.shape == expected.shape and mine.tobytes() == expected.tobytes()


def check(kernels: set[str], call, *arrays) -> None:
    """call(ops, *arrays): with Triton it launches these kernels and returns what the others do."""
    ops, compiled = Counting(), host_ops(NumpyOps)
    assert isinstance(compiled, CompiledOps)
    tensors = [on_device(array.copy()) for array in arrays]
    mine = call(ops, *tensors)
    assert ops.launched == kernels, ops.launched
    assert all(fits(t, array) for t, array in zip(tensors, arrays, strict=True)), "an argument was overwritten"
    for other in (compiled, NumpyOps()):
        assert fits(mine, call(other, *(array.copy() for array in arrays))), [len(a) for a in arrays]
    assert fits(mine, on_host(call(TorchOps(DEVICE), *tensors)))


def gradients():
    """Yields float32 arrays: odd sizes, with zeros and ties, and values that break careless code."""
    for d in SIZES:
        x = np.random.default_rng(d).standard_normal(d).astype(np.float32)
        x[::5], x[1::7] = 0, -1.5
        yield x
    yield np.concatenate(list(inputs.adversarial(99).values()))
    yield np.full(BLOCK + 3, -0.75, np.float32)


def broken():
    """Yields arrays with NaN and infinities among numbers."""
    x = np.random.default_rng(3).standard_normal(577).astype(np.float32)
    x[::11], x[5::100], x[-1] = np.nan, np.inf, -np.inf
    yield x


def case_add_scaled():
    for x in [*gradients(), *broken()]:
        residual = x[::-1].copy()
        for beta, gamma in ((1.0, 1.0), (0.9, 1.0), (0.9, 0.1)):
            with np.errstate(all="ignore"):
                check({"add_scaled"}, lambda o, e, g, b=beta, c=gamma: o.sum_up(Feedback(e, b, c), g), residual, x)


def case_signs():
    for x in [*gradients(), *broken()]:
        check({"pack_signs"}, lambda o, x: o.pack_signs(x), x)
        size = len(x)
        check({"unpack_signs"}, lambda o, data, d=size: o.unpack_signs(data, d), NumpyOps().pack_signs(x))


def case_block_norms():
    every = {len(x): x for x in gradients()}
    x, adversarial = every[SIZES[-1]], inputs.adversarial(BLOCK)
    cases = [(x, len(x)), (x, 500), (x, 512), (x[:1], 1), (x[:7], 3), (x[:1999], 2048), *((other, BLOCK) for other in adversarial.values())]
    cases.append((np.concatenate([x, x, x]), 4099))
    for values, block in cases:
        expected = {"piece_sums"} | ({"add_pieces"} if min(block, len(values)) > 2048 else set())
        for order in (1, 2):
            check(expected, lambda o, x, b=block, n=order: o.block_norms(x, b, n), values)


def case_block_norms_that_are_not_finite():
    for x in broken():
        for order in (1, 2):
            mine = on_host(Counting().block_norms(on_device(x), 500, order))
            assert np.array_equal(mine, NumpyOps().block_norms(x, 500, order), equal_nan=True)


def case_top_k():
    for x in gradients():
        for k in {max(1, len(x) // 100), (len(x) + 1) // 2}:
            if 0 < k < len(x):
                radix = {"histogram", "pick_digit", "count_chosen", "write_chosen"}
                check(radix, lambda o, x, k=k: o.top_k(x, k), x)


def case_at_least():
    for x in [*gradients(), *broken()]:
        for threshold in (0.0, 0.75, np.inf):
            check({"count_chosen", "write_chosen"}, lambda o, x, t=threshold: o.at_least(x, t), x)


def case_bits():
    for d in SIZES:
        for step in (2, 97):
            positions = np.arange(d, dtype=np.int64)[::step].copy()
            check({"set_bits"}, lambda o, p, d=d: o.set_bits(p, d), positions)
            check({"count_bits", "write_bits"}, lambda o, data: o.bit_positions(data), NumpyOps().set_bits(positions, d))
    check({"count_bits", "write_bits"}, lambda o, data: o.bit_positions(data), np.zeros(300, np.uint8))


def case_codes():
    for d in SIZES:
        for width in (1, 4, 7, 11, 31):
            codes = np.random.default_rng(width).integers(0, 1 << width, d)
            check({"pack_codes"}, lambda o, c, w=width: o.pack(c, w), codes)
            check({"unpack_codes"}, lambda o, data, w=width, d=d: o.unpack(data, w, d), NumpyOps().pack(codes, width))


def case_elias_fano():
    """The code of positions, both ways, by the kernels for bits and codes."""
    from grace_ext.compressors.forms.positions import decode_indices, encode_indices

    for d, k in ((5003, 50), (5003, 1), (30_000, 700)):
        positions = np.sort(np.random.default_rng(k).choice(d, k, replace=False)).astype(np.int64)
        check({"pack_codes", "set_bits"}, lambda o, p, d=d: encode_indices(o, p, d, "elias_fano"), positions)
        data = encode_indices(NumpyOps(), positions, d, "elias_fano")
        reads = {"unpack_codes", "count_bits", "write_bits"}
        check(reads, lambda o, data, k=k, d=d: decode_indices(o, data, k, d, "elias_fano"), data)
        check(reads, lambda o, data, k=k, d=d: decode_indices(o.deferring(), data, k, d, "elias_fano"), data)


def case_positions_that_are_not_as_many_as_they_should_be():
    """Operations that defer return as many positions as were asked for, and a flag; there is no room for more."""
    ops, data = Counting().deferring(), NumpyOps().set_bits(np.arange(0, 5000, 3), 5000)
    for wanted in (1600, 1667, 1700):
        found, right = ops.ones_of(on_device(data), wanted)
        assert len(found) == wanted and bool(right) == (wanted == 1667)
        assert np.array_equal(on_host(found)[:1600], np.arange(0, 4800, 3))


def case_random_words():
    for key in ((0, 0), (1, 1), (2**32 - 5, 2**31), (2**31 - 1, 2**32 - 1)):
        check({"random_words"}, lambda o, c, key=key: o.random_words(key, len(c)), np.zeros(BLOCK + 1, np.uint8))


def case_round_randomly():
    for x in gradients():
        scale = 7 / np.maximum(abs(x), 2)
        for levels in (1, 7):
            call = lambda o, x, s, n=levels: o.round_randomly(x, s, n, (2**32 - 9, 12345))  # noqa: E731
            check({"round_randomly"}, call, x, scale)


def case_a_draw_that_24_bits_do_not_decide():
    key = (5, 77)
    draws = rng.words(key, 4096) >> 8
    x = np.where(draws < 2**23, (draws + 0.5) / 2**24, 0.25).astype(np.float32)
    call = lambda o, x, s: o.round_randomly(x, s, 1, key)  # noqa: E731
    check({"round_randomly"}, call, x, np.ones_like(x))


def case_specs():
    """Two steps of two ranks send the same bytes, return the same results and keep the same state as on the CPU."""
    launched = set()
    for spec in SPECS:
        ops = Counting()
        mine = history(spec, "torch", ops, on_device)
        assert mine == history(spec, "numpy", host_ops(NumpyOps), np.asarray), spec
        assert ops.launched, spec
        launched |= ops.launched
    assert launched >= {"add_scaled", "piece_sums", "pack_signs", "unpack_codes", "write_bits", "round_randomly"}, launched


def history(spec, framework, ops, tensor):
    """Returns the bytes of all messages, results and states of two steps; in the second, one gradient is zeros."""
    seen, execute = [], lockstep.execute

    def recorded(collectives, ops):
        if not collectives[0].label.startswith("agree"):  # it names the framework
            seen.extend(ops.host(collective.array).tobytes() for collective in collectives)
        return execute(collectives, ops)

    with mock.patch.object(libraries, "ops_for_framework", lambda framework: ops), mock.patch.object(lockstep, "execute", recorded):
        cluster = LocalCluster(grace_ext.grace(spec), 2, framework=framework)
        for step in range(2):
            shapes = {"one": (1,), "vector": (1500,), "matrix": (33, 17)}
            arrays = inputs.ranks(2, step, shapes=shapes)
            gradients = [{name: tensor(a * np.float32(step == 0 or name != "matrix")) for name, a in each.items()} for each in arrays]
            results = cluster.step(gradients, lr=0.125)
            for mapping in results if isinstance(results, list) else [results]:
                seen.extend(on_host(mapping[name]).tobytes() for name in shapes)
    ranks = cluster.state_dict()["ranks"]
    return seen + [(key, ops.host(array).tobytes()) for rank in ranks for key, array in sorted(rank["state"].items())]


def case_the_choice_of_operations():
    gpu = torch.device("cuda:0")
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        assert type(ops_for(gpu)) is TritonOps
        with mock.patch.dict(os.environ, GRACE_EXT_KERNELS="0"):
            assert type(ops_for(gpu)) is TorchOps
        with mock.patch("triton.__version__", "3.5.1"):
            assert type(ops_for(gpu)) is TorchOps
        with mock.patch("importlib.util.find_spec", lambda name: None):
            assert type(ops_for(gpu)) is TorchOps
    for device in (gpu, torch.device("mps"), torch.device("xpu")):
        assert type(ops_for(device)) is TorchOps


run_cases(SimpleNamespace(size=lambda: 1, rank=lambda: 0, allgather_object=lambda held: [held]), globals())
