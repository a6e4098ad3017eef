"""Tests that every compressor must pass, on every installed tensor library. See `contract`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grace_ext

from ..compressors.base import Compressor
from ..errors import PayloadError
from ..exchange.message import HEADER
from ..parts.field import ITEMSIZE
from ..parts.tensor import StepInfo, TensorSpec
from . import inputs
from .checks import (
    BESIDE,
    check_huge,
    check_in_place,
    check_no_view,
    check_one_bad_rank,
    check_registered,
    check_resume,
    check_shapes,
    check_zeros,
    legal,
    suite,
)
from .worlds import NUMPY, WITH_DEVICE, World, same_bits, states, tapped

INFO = StepInfo(step=3, rank=1, size=2, divisor=2, elements=2000)
SHAPES = ((), (1,), (2,), (7,), (64,), (600,), (5, 3), (24, 50), (4, 3, 5, 5))
QUIET: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def contract(*texts: str) -> type:
    """Returns a class of tests for these compressors, given by spec strings ('mine', 'mine(knob=2)'). Assign it to a name that begins with
    Test.

    The tests check: registration, configuration, shapes and dtypes, zeros and adversarial values, declared sizes against sent bytes,
    purity, the same bytes in every tensor library, equal results on all ranks, error feedback that loses nothing, NaN on one rank,
    resuming, damaged payloads, and what the compressor declares of its error (unbiased, omega, delta, kappa, summable).
    """
    first = {compressor_of(text).name: text for text in reversed(texts)}.values()
    pairs = [pytest.param(w, t, id=f"{w.name}-{t}") for w in WITH_DEVICE for t in texts if w.computes or t in first]
    return suite("TestContract", (Everywhere, "world, text", pairs), (Declared, "text", texts))


def compressor_of(text: str) -> Compressor:
    return grace_ext.grace(f"{text} + none").compressor


def alone(text: str, x: np.ndarray, step: int = 0, seed: int = 0) -> np.ndarray:
    """Returns C(x) in float64: the result of one rank alone at that step, without a memory."""
    cluster = NUMPY.cluster(grace_ext.grace(f"{text} + none", seed=seed), 1)
    cluster.drivers[0].step = step
    with np.errstate(all="ignore"):
        return np.asarray(cluster.step([{"w": x}])["w"], np.float64)


class Everywhere:
    """The tests that run in every tensor library."""

    # --- shapes, values -----------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("memory", ["none", "residual"])
    def test_shapes_dtypes_and_equal_ranks(self, world: World, text: str, memory: str):
        """0-d, empty, one-element, strided and other tensors keep shape and dtype, are finite, and have the same bytes on every rank."""
        for dtype in inputs.DTYPES if world is NUMPY else ("float32",):
            check_shapes(world, f"{text} + {memory}", dtype)

    def test_zeros_decode_to_exact_zeros(self, world: World, text: str):
        """A zero gradient on all ranks gives zero: no 0/0, no vote, no drift."""
        check_zeros(world, f"{text} + residual")

    def test_adversarial_values_stay_finite(self, world: World, text: str):
        """For zeros, ties, subnormals and the largest floats, decoded values are finite, and zeros stay zeros."""
        compressor, ops = compressor_of(text), world.ops
        for shape in ((1,), (7,), (600,), (24, 50)):
            spec = TensorSpec("w", shape)
            if compressor.rounds and len(shape) < 2:
                continue
            for kind, x in inputs.adversarial(spec.size).items():
                if compressor.rounds and np.abs(x).max() > 1e30:
                    continue  # factors are sums over rows and columns, and may overflow; the state after that is tested below
                flat = ops.ingest(world.tensor(x))
                payload, _ = compressor.compress(ops, flat, spec, INFO, compressor.init(ops, spec, INFO))
                out = np.array(ops.host(compressor.decompress(ops, payload, spec, INFO)))
                assert out.shape == (x.size,) and out.dtype == np.float32
                assert np.isfinite(out).all(), (kind, shape)
                assert "zeros" not in kind or not out.any(), (kind, shape)

    def test_huge_values_do_not_poison_the_state(self, world: World, text: str):
        """After gradients near the largest float, and float64 ones beyond it, later steps and the state are finite."""
        for dtype, value in (("float32", 3e38), ("float64", 1e200)):
            check_huge(world, f"{text} + residual", dtype, value)

    def test_float16_near_the_top_of_its_range_stays_finite(self, world: World, text: str):
        """Gradients of 6e4 are legal in half precision (loss scaling puts them there): the result saturates, it does not become Inf."""
        x = np.where(np.arange(1200) % 3, 6e4, -64e3).astype(np.float16).reshape(24, 50)
        out = world.step(world.cluster(grace_ext.grace(f"{text} + none"), 1), [{"w": x}])["w"]
        assert np.isfinite(out.astype(np.float32)).all()

    # --- sizes --------------------------------------------------------------------------------------------------------
    def test_payloads_are_what_fields_declare(self, world: World, text: str):
        """Fixed fields have exactly the declared bytes, and variable fields at most these; the total never exceeds nbytes."""
        compressor, ops = compressor_of(text), world.ops
        for shape in SHAPES:
            spec = TensorSpec("w", shape)
            if len(shape) < 2 and compressor.rounds:
                continue
            for kind, x in inputs.adversarial(spec.size).items():
                with np.errstate(all="ignore"):  # factors of the largest floats overflow
                    payload, _ = compressor.compress(ops, ops.ingest(world.tensor(x)), spec, INFO, compressor.init(ops, spec, INFO))
                fields = compressor.fields(spec)
                assert len(payload) == len(fields)
                for field, array in zip(fields, payload, strict=True):
                    declared = field.count * ITEMSIZE[field.dtype]
                    assert len(array) <= declared if field.variable else len(array) == declared, (field, kind, shape)
                total = sum(len(array) + 4 * field.variable for field, array in zip(fields, payload, strict=True))
                assert total <= compressor.nbytes(spec), (kind, shape)

    def test_wire_bytes_are_what_is_declared(self, world: World, text: str):
        """Each rank hands at most the declared payloads, plus headers and flags, to collectives."""
        g = grace_ext.grace(f"{text} + residual")
        cluster = world.cluster(g, 2)
        declared = sum(g.nbytes(TensorSpec(name, shape)) for name, shape in inputs.SHAPES.items())
        for step in range(2):
            with tapped() as seen:
                world.step(cluster, inputs.ranks(2, step))
            assert cluster.wire_bytes == [sum(s.nbytes[rank] for s in seen) for rank in range(2)]
            overhead = sum(ITEMSIZE[s.dtype] if s.kind == "allreduce" else HEADER.size for s in seen)
            assert max(cluster.wire_bytes) <= declared + overhead

    # --- purity -------------------------------------------------------------------------------------------------------
    def test_no_view_of_the_gradient(self, world: World, text: str):
        """The gradient is not modified; overwriting it, or the result, after the step does not change the state."""
        check_no_view(world, f"{text} + residual")

    def test_in_place(self, world: World, text: str):
        """Results that are written over the gradients are the same bits, whatever communicator carries the payloads."""
        for spec in legal(f"{text} + residual {rest}" for rest in (BESIDE if world is NUMPY else BESIDE[:3])) if world.mutable else ():
            check_in_place(world, spec)

    def test_decompress_is_pure_and_gives_a_new_array(self, world: World, text: str):
        """Decoding twice gives the same, and writing into the first result changes neither the payload nor the second."""
        compressor, spec, ops = compressor_of(text), TensorSpec("w", (24, 50)), world.ops
        x = ops.ingest(world.tensor(inputs.normal(0, 0, shapes={"w": (24, 50)})["w"]))
        payload, _ = compressor.compress(ops, x, spec, INFO, compressor.init(ops, spec, INFO))
        first = compressor.decompress(ops, payload, spec, INFO)
        kept = np.array(ops.host(first))
        first[...] = 99.0
        assert np.array_equal(np.array(ops.host(compressor.decompress(ops, payload, spec, INFO))), kept)

    def test_what_an_observer_learns(self, world: World, text: str):
        """`observed` gives a linear operator, and values that are as near to it as the decoded gradient is to the raw one."""
        compressor, spec, ops = compressor_of(text), TensorSpec("w", (24, 50)), world.ops
        x, y = (ops.ingest(world.tensor(inputs.normal(0, step, shapes={"w": (24, 50)})["w"])) for step in range(2))
        state = compressor.init(ops, spec, INFO)
        payload, _ = compressor.compress(ops, x, spec, INFO, state)
        decoded = compressor.decompress(ops, payload, spec, INFO)
        values, operator = compressor.observed(ops, payload, spec, INFO, state)
        of_x, of_y, of_both = (np.asarray(ops.host(operator(each)), np.float64) for each in (x, y, 2 * x - 3 * y))
        rounding = 1e-5 * float(np.linalg.norm(ops.host(x)))
        assert np.linalg.norm(of_both - 2 * of_x + 3 * of_y) <= 10 * rounding
        assert values.shape == of_x.shape
        lost = np.linalg.norm(np.asarray(ops.host(decoded), np.float64) - ops.host(x))
        assert np.linalg.norm(ops.host(values) - of_x) <= lost + rounding

    # --- every library, every rank, every start -----------------------------------------------------------------------
    def test_the_same_as_numpy(self, world: World, text: str):
        """Bytes on the wire, results and state equal those of the reference, or are close to them if bytes may differ."""
        g = grace_ext.grace(f"{text} + residual")
        runs = []
        for one in (world, NUMPY):
            cluster, outs = one.cluster(g, 2), []
            with np.errstate(all="ignore"), tapped() as seen:
                for step in range(2):
                    outs.append(one.step(cluster, inputs.ranks(2, step)))
            runs.append(([(s.kind, s.label, s.buffers) for s in seen], [*outs, *states(cluster, one)]))
        (wire, ours), (wire0, theirs) = runs
        if g.compressor.deterministic_bytes:
            assert wire == wire0 and all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
            return
        assert [w[:2] for w in wire] == [w[:2] for w in wire0]
        for a, b in zip(ours, theirs, strict=True):
            for name in b:
                assert np.allclose(a[name].astype(np.float64), b[name].astype(np.float64), rtol=1e-2, atol=1e-4), name

    def test_determinism(self, world: World, text: str):
        """The same gradients at the same steps give the same bytes on the wire, the same results and the same state."""
        runs = []
        for _ in range(2):
            cluster, outs = world.cluster(grace_ext.grace(f"{text} + residual"), 2), []
            with tapped() as seen:
                for step in range(2):
                    outs.append({k: v.tobytes() for k, v in world.step(cluster, inputs.ranks(2, step)).items()})
            kept = [{k: v.tobytes() for k, v in held.items()} for held in states(cluster, world)]
            runs.append(([s.buffers for s in seen], outs, kept))
        assert runs[0] == runs[1]

    def test_resume_is_bit_exact(self, world: World, text: str):
        """A fresh cluster that loads the state continues exactly like the one that was saved."""
        check_resume(world, f"{text} + residual")

    # --- error feedback, failures -------------------------------------------------------------------------------------
    def test_what_is_sent_and_what_is_kept_add_up(self, world: World, text: str):
        """g + residual = sent + new residual, except for the rounding of the new residual."""
        g = grace_ext.grace(f"{text} + residual")
        cluster = world.cluster(g, 1)
        held: dict[str, np.ndarray] = {}
        for step in range(3):
            gradients = inputs.ranks(1, step)
            out = world.step(cluster, gradients)
            after = states(cluster, world)[0]
            for name, gradient in gradients[0].items():
                if not gradient.size or g.compressor.result != "mean":
                    continue  # the result of a vote is not what was sent
                before = gradient.astype(np.float64).ravel() + held.get(f"residual/{name}", 0.0)
                error = out[name].astype(np.float64).ravel() + after[f"residual/{name}"] - before
                scale = np.abs(before).max() + np.abs(out[name]).max()
                assert np.abs(error).max() <= (1e-6 if g.compressor.deterministic_bytes else 1e-5) * scale, name
            held = {k: v.astype(np.float64) for k, v in after.items()}

    def test_one_bad_rank(self, world: World, text: str):
        """With a few or many NaN on one of two ranks, or on both, both return NaN, and no state changes; the next step works as if
        these had not been made."""
        check_one_bad_rank(world, f"{text} + residual")

    @settings(max_examples=12, **QUIET)
    @given(data=st.data())
    def test_any_bytes(self, world: World, text: str, data):
        """A gathered message with random bytes changed, cut or added gives a PayloadError or a result of the right shapes."""
        shapes, g = {"v": (90,), "m": (6, 11)}, grace_ext.grace(f"{text} + none")

        def change(collectives, ops):
            if collectives[0].kind not in ("allgather", "broadcast"):
                return collectives
            message = bytearray(np.array(ops.host(collectives[1].array)).tobytes())
            lowest = data.draw(st.sampled_from([0, HEADER.size]))
            for _ in range(data.draw(st.integers(1, 6))):
                message[data.draw(st.integers(lowest, len(message) - 1))] = data.draw(st.integers(0, 255))
            if data.draw(st.booleans()):
                message = message[: data.draw(st.integers(0, len(message)))] + bytes(data.draw(st.integers(0, 20)))
                if len(message) >= HEADER.size:
                    message[16:24] = (len(message) - HEADER.size).to_bytes(8, "little")
            return [collectives[0], collectives[1]._replace(array=ops.upload(np.frombuffer(bytes(message), np.uint8).copy()))]

        cluster, gradients = world.cluster(g, 2), inputs.ranks(2, 0, shapes=shapes)
        with tapped(change), np.errstate(all="ignore"):
            try:
                out = world.step(cluster, gradients)
            except PayloadError as error:
                assert error.rank == 1
            else:
                assert {name: array.shape for name, array in out.items()} == shapes


class Declared:
    """The tests of what the compressor declares, in the reference library."""

    def test_is_a_registered_value(self, text: str):
        """It is found by name, equal if its knobs are, and the same after a round trip through JSON and through its string."""
        part = compressor_of(text)
        check_registered(part, f"{text} + none", compressor_of(str(part)))

    @pytest.mark.parametrize("kind", ["normal", "heavy tails", "one large"])
    def test_declared_error(self, text: str, kind: str):
        """unbiased, omega and delta hold in the mean over draws (within 6 standard errors), kappa for every draw."""
        compressor = compressor_of(text)
        if compressor.result == "vote":
            pytest.skip("a vote does not approximate the gradient")
        d = 1024
        omega, delta, kappa = compressor.omega(d), compressor.delta(d), compressor.kappa(d)
        assert omega is None or compressor.unbiased, "only an unbiased compressor has an omega"
        assert delta is None or 0 < delta <= 1
        x = sample(kind, d)
        draws = 200 if compressor.unbiased or delta is not None else 3
        outs = np.array([alone(text, x.reshape(32, 32), step).ravel() for step in range(draws)])
        errors = ((outs - x) ** 2).sum(axis=1)
        norm = float((x.astype(np.float64) ** 2).sum())
        slack = 6 * errors.std() / math.sqrt(draws) + 1e-6 * norm
        if compressor.unbiased:
            # Sums over all elements with random signs, and with the signs of x: a single element may be drawn too rarely to test.
            directions = np.concatenate([np.random.default_rng(0).choice([-1.0, 1.0], (16, d)), [np.sign(x)]])
            along = (outs - x) @ directions.T
            limit = 6 * along.std(axis=0) / math.sqrt(draws) + 1e-6 * np.abs(directions * x).sum(axis=1)
            assert (np.abs(along.mean(axis=0)) <= limit).all()
        if omega is not None:
            assert errors.mean() <= omega * norm + slack
        if delta is not None:
            assert errors.mean() <= (1 - delta) * norm + slack
        if kappa is not None:
            assert errors.max() <= kappa**2 * (1 + 1e-5) + 1e-12

    @settings(max_examples=40, **QUIET)
    @given(data=st.data())
    def test_declared_error_of_any_vector(self, text: str, data):
        """delta of deterministic compressors, and kappa, hold for vectors that hypothesis generates."""
        compressor = compressor_of(text)
        two = [alone(text, sample("normal", 64), step) for step in range(2)]
        delta, kappa = compressor.delta(64), compressor.kappa(64)
        if delta is not None and not np.array_equal(two[0], two[1]):
            delta = None  # a random compressor keeps it in the mean only
        if compressor.result == "vote" or (delta is None and not kappa):
            return
        x = np.array(data.draw(st.lists(st.floats(-1e3, 1e3, width=32), min_size=64, max_size=64)), np.float32)
        error = float(((alone(text, x) - x) ** 2).sum())
        norm = float((x.astype(np.float64) ** 2).sum())
        if delta is not None:
            assert error <= (1 - delta) * norm * (1 + 1e-5) + 1e-30
        if kappa is not None:
            assert error <= kappa**2 * (1 + 1e-5) + 1e-10 * norm

    def test_summed_payloads_are_the_mean_of_single_ones(self, text: str):
        """A summable compressor gives the same by all-reduce as by gathering and averaging, except for rounding."""
        compressor = compressor_of(text)
        if not compressor.summable or type(compressor).exchange is not Compressor.exchange:
            return  # it exchanges by rounds of its own
        gradients = inputs.ranks(3, 0, shapes={"m": (24, 50)})
        by_sum, by_gather = (
            NUMPY.step(NUMPY.cluster(grace_ext.grace(f"{text} + none @ {c}"), 3), gradients)["m"] for c in ("allreduce", "allgather")
        )
        scale = max(np.abs(g["m"]).max() for g in gradients)
        rounding = {"float16": 2**-10, "bfloat16": 2**-7}.get(compressor.fields(TensorSpec("m", (24, 50)))[0].dtype, 1e-6)
        assert np.abs(by_sum.astype(np.float64) - by_gather).max() <= scale * rounding


def sample(kind: str, d: int) -> np.ndarray:
    """Returns float32[d] of a kind: 'normal', 'heavy tails' or 'one large'."""
    generator = np.random.default_rng(d)
    x = generator.standard_normal(d)
    if kind == "heavy tails":
        x *= np.exp(1.5 * generator.standard_normal(d))
    if kind == "one large":
        x *= 0.01
        x[d // 3] = 30
    return x.astype(np.float32)
