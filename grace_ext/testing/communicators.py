"""The contract that every communicator keeps. See `communicator_contract`."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

import grace_ext

from ..errors import IncompatiblePartsError, PayloadError
from ..exchange.message import HEADER
from ..parts.field import ITEMSIZE
from ..parts.tensor import StepInfo, TensorSpec
from . import inputs
from .compressors import check_no_view, check_shapes
from .worlds import NUMPY, WORLDS, World, same_bits, states, tapped

#: What a communicator is tried with: those of these that it carries.
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
    """Returns a class of tests for these communicators, by spec string: assign it to a name that begins with Test.

    Checked with every compressor of COMPRESSORS that it carries: registration, configuration, shapes and dtypes, the mean for 1, 2, 3 and 5
    ranks and tensors smaller than that, equal results on all ranks, purity, the same bits in every tensor library, NaN on one rank, damaged
    messages, resuming, and what it declares: `collectives`, `input_bytes`, `keeps_state`.
    """
    for text in texts:
        if not accepted(text):
            raise ValueError(f"communicator {text!r} carries none of {', '.join(COMPRESSORS)}: this suite cannot test it")
    pairs = [pytest.param(w, f"{c} + none @ {t}", id=f"{w.name}-{c} @ {t}") for w in WORLDS for t in texts for c in _tried(w, t)]
    everywhere = type("TestEverywhere", (Everywhere,), {"pytestmark": [pytest.mark.parametrize(("world", "spec"), pairs)]})
    specs = [f"{c} + none @ {t}" for t in texts for c in accepted(t)]
    carried = type("TestCarried", (Carried,), {"pytestmark": [pytest.mark.parametrize("spec", specs)]})
    declared = type("TestDeclared", (Declared,), {"pytestmark": [pytest.mark.parametrize("text", texts)]})
    return type("TestCommunicatorContract", (), {"TestEverywhere": everywhere, "TestCarried": carried, "TestDeclared": declared})


def accepted(text: str) -> list[str]:
    """Returns those of COMPRESSORS that this communicator carries."""
    found = []
    for compressor in COMPRESSORS:
        try:
            grace_ext.grace(f"{compressor} + none @ {text}")
        except IncompatiblePartsError:
            continue
        found.append(compressor)
    return found


def _tried(world: World, text: str) -> list[str]:
    """All on the reference; on other libraries the first."""
    return accepted(text) if world is NUMPY else accepted(text)[:1]


class Everywhere:
    """What holds in every tensor library."""

    def test_shapes_dtypes_and_equal_ranks(self, world: World, spec: str):
        """0-d, empty, one-element, strided and other tensors come back in shape and dtype, finite, the same bytes on every rank."""
        for dtype in inputs.DTYPES if world is NUMPY else ("float32",):
            check_shapes(world, spec, dtype)

    def test_no_view_of_the_gradient(self, world: World, spec: str):
        """The gradient is not modified; overwriting it, or the result, after the step changes nothing that is remembered."""
        check_no_view(world, spec)

    def test_the_same_as_numpy(self, world: World, spec: str):
        """The same bytes on the wire, results and state as the reference."""
        runs = []
        for one in (world, NUMPY):
            cluster = one.cluster(grace_ext.grace(spec), 3)
            with tapped() as seen:
                outs = [one.step(cluster, inputs.ranks(3, step)) for step in range(2)]
            runs.append(([(s.kind, s.label, s.buffers) for s in seen], [*outs, *states(cluster, one)]))
        assert runs[0][0] == runs[1][0] and all(same_bits(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))

    def test_one_bad_rank(self, world: World, spec: str):
        """NaN on one of three ranks: all return NaN, and nobody remembers anything of the step."""
        shapes = {"a": (40,), "m": (24, 18)}
        cluster = world.cluster(grace_ext.grace(spec), 3)
        world.step(cluster, inputs.ranks(3, 0, shapes=shapes))
        held, bad = states(cluster, world), inputs.ranks(3, 1, shapes=shapes)
        bad[1]["m"][3, 4] = np.nan
        with np.errstate(all="ignore"):
            returned = world.everywhere(cluster, bad)
        assert all(np.isnan(out["m"]).all() for out in returned) and all(same_bits(out, returned[0]) for out in returned)
        assert all(same_bits(a, b) for a, b in zip(held, states(cluster, world), strict=True))


class Carried:
    """What holds for each compressor that it carries."""

    @pytest.mark.parametrize("size", SIZES)
    def test_the_mean_of_what_the_ranks_sent(self, spec: str, size: int):
        """For a compressor whose result is a mean: of what every rank's payload decodes to, to rounding; the sum is n times that.
        A communicator that compresses again (its `keeps_state`, or another recompressor) is held to the input's mean for 'none' alone."""
        g = grace_ext.grace(spec)
        compressor = g.compressor
        shapes = {"w": (24, 50), "few": (size - 1,), "one": (1,), "empty": (0,)}
        gradients = inputs.ranks(size, 0, shapes=shapes)
        out = NUMPY.step(NUMPY.cluster(g, size), gradients)
        lossy_twice = g.communicator.name == "reduce_scatter" or g.communicator.keeps_state(compressor)
        if compressor.result != "mean" or (lossy_twice and compressor.name != "none"):
            return  # shapes, equal ranks and bytes are tested above; what it means is for tests of its own
        for name in ("w", "one"):
            sent = [_decoded(g, rank, size, name, mine[name]) for rank, mine in enumerate(gradients)]
            mean = sum(sent) / size
            tolerance = 1e-3 if compressor.name == "fp16" else 1e-6
            assert np.abs(out[name].ravel() - mean).max() <= tolerance * (1 + np.abs(mean).max()), name

    def test_collectives_are_what_is_declared(self, spec: str):
        """The kinds that really start, in order, and for payloads of a fixed size their bytes, headers and rounding excluded."""
        g, n, shape = grace_ext.grace(spec), 4, (96, 100)
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
        """`init` gives a state exactly if `keeps_state` says so, and a fresh cluster continues from it bit for bit."""
        g, tensor = grace_ext.grace(spec), TensorSpec("m", (24, 18))
        begun = g.communicator.init(NUMPY.ops, g.compressor, tensor, StepInfo(0, 0, 3, 3))
        assert bool(begun) == g.communicator.keeps_state(g.compressor)
        cluster, fresh = NUMPY.cluster(g, 3), NUMPY.cluster(g, 3)
        for step in range(2):
            NUMPY.step(cluster, inputs.ranks(3, step))
        fresh.load_state_dict(copy.deepcopy(cluster.state_dict()))
        assert same_bits(NUMPY.step(cluster, inputs.ranks(3, 2)), NUMPY.step(fresh, inputs.ranks(3, 2)))

    @pytest.mark.parametrize("at", [0, HEADER.size, -1])
    def test_a_damaged_message_is_an_error_or_a_result(self, spec: str, at: int):
        """A byte that a peer sent wrongly gives a PayloadError that names the peer, or a result of the right shapes."""

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
    """float64: what this rank's payload decodes to, by the compressor alone."""
    compressor, ops, tensor = g.compressor, NUMPY.ops, TensorSpec(name, gradient.shape)
    if compressor.sends_dense(tensor) or compressor.name == "none":
        return gradient.astype(np.float64).ravel()
    info = StepInfo(0, rank, size, size)
    payload, _ = compressor.compress(ops, ops.ingest(gradient), tensor, info, compressor.init(ops, tensor, info))
    return np.array(ops.host(compressor.decompress(ops, payload, tensor, info)), np.float64)


class Declared:
    """What holds of the communicator itself."""

    def test_is_a_registered_value(self, text: str):
        """Found by name, equal by its knobs, and the same after a round trip through JSON and through its string."""
        g = grace_ext.grace(f"{accepted(text)[0]} + none @ {text}", seed=7)
        part = g.communicator
        assert grace_ext.communicators.get(part.name) is type(part)
        assert grace_ext.grace(json.loads(json.dumps(g.to_config()))) == g
        again = grace_ext.grace(f"{accepted(text)[0]} + none @ {part}").communicator
        assert again == part and hash(again) == hash(part)
        assert (type(part).__doc__ or "").strip().splitlines()[0].endswith(".")

    def test_costs_are_numbers(self, text: str):
        """`collectives`, `bytes_sent` and `decodes` are not negative for any number of ranks, and nothing is sent by one rank alone."""
        part = grace_ext.grace(f"{accepted(text)[0]} + none @ {text}").communicator
        for n in (1, 2, 7, 1000):
            declared = part.collectives(n, 1000.0, 80_000.0)
            assert declared and all(kind in KINDS and nbytes >= 0 for kind, nbytes in declared)
            assert part.bytes_sent(n, 1000.0, 80_000.0) >= 0 and part.decodes(n) > 0
        assert part.bytes_sent(1, 1000.0, 80_000.0) == 0

    def test_refuses_by_the_right_error(self, text: str):
        """`check` and `check_memory` say what does not fit by IncompatiblePartsError, for every part there is."""
        part = grace_ext.grace(f"{accepted(text)[0]} + none @ {text}").communicator
        for registry, ask in ((grace_ext.compressors, part.check), (grace_ext.memories, part.check_memory)):
            for name in registry.names():
                try:
                    ask(registry.get(name).create())
                except IncompatiblePartsError as error:
                    assert str(error)
