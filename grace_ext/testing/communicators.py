"""Tests that every communicator must pass. See `communicator_contract`."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext

from ..errors import IncompatiblePartsError, PayloadError
from ..exchange.message import HEADER
from ..parts.field import ITEMSIZE
from ..parts.tensor import StepInfo, TensorSpec
from . import inputs
from .checks import accepted, check_in_place, check_no_view, check_one_bad_rank, check_registered, check_resume, check_shapes, legal, suite
from .worlds import NUMPY, WITH_DEVICE, World, same_bits, states, tapped

#: A communicator is tested with those of these compressors that it accepts.
COMPRESSORS = (
    "none",
    "fp16",
    "topk(ratio=0.25)",
    "threshold(threshold=0.5)",
    "randomk(ratio=0.25)",
    "efsignsgd",
    "qsgd(bits=4)",
    "signsgd",
)
SIZES = (1, 2, 3, 5)
KINDS = ("allreduce", "allgather", "broadcast", "alltoall")


def communicator_contract(*texts: str) -> type:
    """Returns a class of tests for these communicators, given by spec strings. Assign it to a name that begins with Test.

    With every compressor of COMPRESSORS that the communicator accepts, the tests check: registration, configuration, shapes and dtypes, the
    mean for 1, 2, 3 and 5 ranks and tensors smaller than that, equal results on all ranks, purity, the same bits in every tensor library,
    NaN on one rank, damaged messages, resuming, and what it declares: `collectives`, `input_bytes`, `keeps_state`.
    """
    specs = {text: [f"{compressor} + none @ {text}" for compressor in accepted(COMPRESSORS, f"+ none @ {text}")] for text in texts}
    # Other libraries differ from the reference in their arithmetic only, for which one compressor is enough.
    pairs = [
        pytest.param(w, spec, id=f"{w.name}-{spec}")
        for w in WITH_DEVICE
        for text in texts
        for spec in specs[text][: None if w is NUMPY else 1]
    ]
    return suite(
        "TestCommunicatorContract",
        (Everywhere, "world, spec", pairs),
        (Carried, "spec", [spec for text in texts for spec in specs[text]]),
        (Declared, "spec", [specs[text][0] for text in texts]),
    )


class Everywhere:
    """The tests that run in every tensor library."""

    def test_shapes_dtypes_and_equal_ranks(self, world: World, spec: str):
        """0-d, empty, one-element, strided and other tensors keep shape and dtype, are finite, and have the same bytes on every rank."""
        for dtype in inputs.DTYPES if world is NUMPY else ("float32",):
            check_shapes(world, spec, dtype)

    def test_no_view_of_the_gradient(self, world: World, spec: str):
        """The gradient is not modified; overwriting it, or the result, after the step does not change the state."""
        check_no_view(world, spec)

    def test_the_same_as_numpy(self, world: World, spec: str):
        """Bytes on the wire, results and state equal those of the reference."""
        runs = []
        for one in (world, NUMPY):
            cluster = one.cluster(grace_ext.grace(spec), 3)
            with tapped() as seen:
                outs = [one.step(cluster, inputs.ranks(3, step)) for step in range(2)]
            runs.append(([(s.kind, s.label, s.buffers) for s in seen], [*outs, *states(cluster, one)]))
        assert runs[0][0] == runs[1][0] and all(same_bits(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))

    def test_in_place(self, world: World, spec: str):
        """Results that are written over the gradients are the same bits, with and without a residual."""
        for one in legal([spec, spec.replace("+ none", "+ residual")]) if world.mutable else ():
            check_in_place(world, one)

    def test_one_bad_rank(self, world: World, spec: str):
        """With a few or many NaN on one of three ranks, or on all, all return NaN, and no state changes."""
        check_one_bad_rank(world, spec, size=3)


class Carried:
    """The tests that run with each compressor that it accepts."""

    @pytest.mark.parametrize("size", SIZES)
    def test_the_mean_of_what_the_ranks_sent(self, spec: str, size: int):
        """If the compressor's result is a mean, it is the mean of what every rank's payload decodes to, up to rounding. A communicator that
        compresses again is tested with 'none' only."""
        g = grace_ext.grace(spec)
        compressor = g.compressor
        shapes = {"w": (24, 50), "few": (size - 1,), "one": (1,), "empty": (0,)}
        gradients = inputs.ranks(size, 0, shapes=shapes)
        out = NUMPY.step(NUMPY.cluster(g, size), gradients)
        lossy_twice = g.communicator.name == "reduce_scatter" or g.communicator.keeps_state(compressor)
        if compressor.result != "mean" or (lossy_twice and compressor.name != "none"):
            return  # what such a result means is for tests of its own
        for name in ("w", "one"):
            sent = [_decoded(g, rank, size, name, mine[name]) for rank, mine in enumerate(gradients)]
            mean = sum(sent) / size
            tolerance = 1e-3 if compressor.name == "fp16" else 1e-6
            assert np.abs(out[name].ravel() - mean).max() <= tolerance * (1 + np.abs(mean).max()), name

    def test_collectives_are_what_is_declared(self, spec: str):
        """`collectives` names the kinds that really start, in order, and bounds the bytes of payloads of a fixed size, headers excluded."""
        g, n, shape = grace_ext.grace(spec), 4, (300, 400)  # large enough to be cut among the ranks
        tensor = TensorSpec("w", shape)
        with tapped() as seen:
            NUMPY.step(NUMPY.cluster(g, n), inputs.ranks(n, 0, shapes={"w": shape}))
        declared = g.communicator.collectives(n, g.compressor.nbytes(tensor), tensor.nbytes)
        assert [s.kind for s in seen] == [kind for kind, _ in declared] and set(dict(declared)) <= set(KINDS)
        if g.compressor.fixed_size and g.compressor.result == "mean":
            for real, (kind, nbytes) in zip(seen, declared, strict=True):
                headers = HEADER.size * (n if kind == "alltoall" else 1) + ITEMSIZE.get(real.dtype, 1)
                assert max(real.nbytes) <= 1.05 * nbytes + headers + 16 * n, (kind, real.nbytes, nbytes)

    @pytest.mark.parametrize("size", SIZES)
    def test_it_hands_in_at_most_what_it_declares(self, spec: str, size: int):
        """`input_bytes` bounds what really went to the collectives, headers and flags excluded."""
        g = grace_ext.grace(spec)
        cluster, shapes = NUMPY.cluster(g, size), {"m": (24, 18), "v": (7,)}
        for step in range(2):
            with tapped() as seen:
                NUMPY.step(cluster, inputs.ranks(size, step, shapes=shapes))
            declared = sum(g.nbytes(TensorSpec(name, shape), size) for name, shape in shapes.items())
            overhead = sum(HEADER.size * (size if s.kind == "alltoall" else 1) + 8 for s in seen)
            assert max(cluster.wire_bytes) <= declared + overhead

    def test_state_is_there_if_it_says_so(self, spec: str):
        """`init` returns a state exactly if `keeps_state` says so, and a fresh cluster continues from it bit for bit."""
        g, tensor = grace_ext.grace(spec), TensorSpec("m", (24, 18))
        begun = g.communicator.init(NUMPY.ops, g.compressor, tensor, StepInfo(0, 0, 3, 3))
        assert bool(begun) == g.communicator.keeps_state(g.compressor)
        check_resume(NUMPY, spec, size=3)

    @pytest.mark.parametrize("at", [0, HEADER.size, -1])
    def test_a_damaged_message_is_an_error_or_a_result(self, spec: str, at: int):
        """A message with one wrong byte gives a PayloadError that names the sender, or a result of the right shapes."""

        def change(collectives, ops):
            first = collectives[0]
            if first.kind == "allreduce" or first.dtype != "uint8" or not len(collectives[1].array):
                return collectives
            data = np.array(ops.host(collectives[1].array))
            data[at if abs(at) < len(data) else 0] ^= 0x5A
            return [first, collectives[1]._replace(array=ops.upload(data)), *collectives[2:]]

        shapes = {"v": (90,), "m": (6, 11)}
        with tapped(change), np.errstate(all="ignore"):
            try:
                out = NUMPY.step(NUMPY.cluster(grace_ext.grace(spec), 2), inputs.ranks(2, 0, shapes=shapes))
            except PayloadError as error:
                assert error.rank == 1
            else:
                assert {name: array.shape for name, array in out.items()} == shapes


def _decoded(g: grace_ext.Grace, rank: int, size: int, name: str, gradient: np.ndarray) -> np.ndarray:
    """Returns what this rank's payload decodes to, by the compressor alone, in float64."""
    compressor, ops, tensor = g.compressor, NUMPY.ops, TensorSpec(name, gradient.shape)
    if compressor.sends_dense(tensor) or compressor.name == "none":
        return gradient.astype(np.float64).ravel()
    info = StepInfo(0, rank, size, size)
    payload, _ = compressor.compress(ops, ops.ingest(gradient), tensor, info, compressor.init(ops, tensor, info))
    return np.array(ops.host(compressor.decompress(ops, payload, tensor, info)), np.float64)


class Declared:
    """The tests of the communicator itself."""

    def test_is_a_registered_value(self, spec: str):
        """It is found by name, equal if its knobs are, and the same after a round trip through JSON and through its string."""
        g = grace_ext.grace(spec)
        again = grace_ext.grace(f"{g.compressor} + none @ {g.communicator}").communicator
        check_registered(g.communicator, spec, again)

    def test_costs_are_numbers(self, spec: str):
        """`collectives`, `bytes_sent` and `decodes` are not negative for any number of ranks, and nothing is sent by one rank alone."""
        part = grace_ext.grace(spec).communicator
        for n in (1, 2, 7, 1000):
            declared = part.collectives(n, 1000.0, 80_000.0)
            assert declared and all(kind in KINDS and nbytes >= 0 for kind, nbytes in declared)
            assert part.bytes_sent(n, 1000.0, 80_000.0) >= 0 and part.decodes(n) > 0
        assert part.bytes_sent(1, 1000.0, 80_000.0) == 0

    def test_rejects_by_the_right_error(self, spec: str):
        """`check` and `check_memory` reject a part that does not fit by an IncompatiblePartsError; tried with every part."""
        part = grace_ext.grace(spec).communicator
        for registry, ask in ((grace_ext.compressors, part.check), (grace_ext.memories, part.check_memory)):
            for name in registry.names():
                try:
                    ask(registry.get(name).create())
                except IncompatiblePartsError as error:
                    assert str(error)
