"""Runs a case of mix_fuzz.py, and checks what must be true of every mix of parts."""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import grace_ext
from grace_ext import LocalCluster
from grace_ext.composition.grace import Grace
from grace_ext.errors import CheckpointError, UnsupportedError
from grace_ext.exchange.effects import Effects, Start
from grace_ext.exchange.message import HEADER
from grace_ext.parts.field import ITEMSIZE
from grace_ext.testing.worlds import NUMPY, WITH_DEVICE, World, same_bits, states

from . import mix_long
from .mix_case import Broken, Case, gradients

State = dict[str, np.ndarray]
WORLD = {world.name: world for world in WITH_DEVICE}
#: By path: the library, and what happens to the cluster before its first step.
PATHS = {
    "plain": "numpy-plain", "torch": "torch-host", "device": "torch-cuda", "tensorflow": "tensorflow",
    "in place": "numpy", "torch in place": "torch-host", "metrics": "numpy", "buckets": "numpy",
}  # fmt: skip
#: The relative size of a rounding in each dtype, times a few.
ROUNDING = {"float64": 4e-6, "float32": 4e-6, "float16": 4e-3, "bfloat16": 3e-2}


class Run:
    """One cluster on its way through a case: what it returned, and the states after each step, by rank."""

    def __init__(self, case: Case, grace: Grace, path: str = ""):
        self.case, self.grace, self.path = case, grace, path
        self.world: World = WORLD[PATHS.get(path, "numpy")]
        self.cluster = self.world.cluster(grace, case.size, case.per_node)
        self.overhead = [0] * case.size
        self.outs: list[list[State]] = []
        self.states: list[list[State]] = []
        for rank, driver in enumerate(self.cluster.drivers):
            driver.exchange = partial(self._counted, rank, driver.exchange)  # type: ignore[method-assign]
            driver.bucket_bytes = 600 if path == "buckets" else driver.bucket_bytes
        if path.endswith("in place"):
            self.world.in_place(self.cluster)
        if path == "metrics":
            self.cluster.measure(every=2)

    def _counted(self, rank: int, exchange: Any, given: Any) -> Effects:
        """Makes a step, and counts the bytes in it that are no tensor's: headers, flags and reports of policies."""
        effects, answer = exchange(given), None
        while True:
            try:
                effect = effects.send(answer)
            except StopIteration as stop:
                return stop.value
            if isinstance(effect, Start):
                c = effect.collective
                pieces = len(c.sizes or ()) if c.kind == "alltoall" else self.case.size if c.group == "inside" else 1
                header = ITEMSIZE[c.dtype] if c.kind == "allreduce" else HEADER.size * pieces
                self.overhead[rank] += c.nbytes if c.label == "settle" else min(header, c.nbytes)
            answer = yield effect

    def step(self, step: int, given: list[State]) -> None:
        self.overhead = [0] * self.case.size
        out = self.world.everywhere(self.cluster, given, self.case.rate(step))
        self.outs.append([{name: array.copy() for name, array in mapping.items()} for mapping in out])
        self.states.append(states(self.cluster, self.world))


def check(case: Case, tally: Counter[str]) -> None:
    """Runs a case. Raises Broken, or whatever the library raises; counts the checks that were made."""
    grace = grace_ext.grace(case.spec, seed=case.seed)
    for again in (grace_ext.grace(str(grace), seed=case.seed), grace_ext.grace(grace.to_config())):
        if again != grace:
            raise Broken("round trip", f"{grace!r} became {again!r}")
    tally["round trip"] += 1
    if case.long:
        mix_long.CHECKS[case.long](case, tally)
        return
    run, saved = Run(case, grace), None
    for step in range(case.steps):
        if step == case.load_at:
            saved = _save(case, run.cluster)
        given = gradients(case, step)
        try:
            run.step(step, given)
        except UnsupportedError as error:
            if "a node counts once" in str(error):  # models that differ, on nodes of unlike size
                tally["refused when ranks met"] += 1
                return
            raise
        check_step(run, step, given, gradients(case, step), tally)
    if saved is not None:
        check_resume(run, saved, tally)
    if case.path and repeatable(grace):
        check_path(run, tally)


def repeatable(grace: Grace, path: str = "in place") -> bool:
    """Whether the same gradients always give the same bits: not if what is chosen depends on times, nor, with other array operations, if
    a compressor's bytes may differ."""
    if any(policy.timed for policy in grace.policies):
        return False
    return path in ("in place", "metrics", "buckets", "") or all(leaf.compressor.deterministic_bytes for leaf in grace.leaves)


# --- one step ---------------------------------------------------------------------------------------------------------
def check_step(run: Run, step: int, given: list[State], before: list[State], tally: Counter[str]) -> None:
    """Checks the results and states of the step that was just made. before: the same gradients, drawn again."""
    case, outs, held = run.case, run.outs[-1], run.states[-1]
    last = run.states[-2] if len(run.states) > 1 else [{} for _ in outs]

    def must(truth: bool, invariant: str, text: str = "", about: str = "") -> None:
        tally[invariant] += 1
        if not truth:
            raise Broken(invariant, f"step {step}: {text}", about)

    for mine, drawn in zip(given, before, strict=True):
        must(same_bits(mine, drawn), "inputs unchanged", "a gradient was changed")
    for tensor in case.tensors:
        out = outs[0][tensor.name]
        same = out.shape == tensor.shape and out.dtype == given[0][tensor.name].dtype
        must(same, "shape and dtype", f"{tensor}: {out.shape} {out.dtype}")
    if not run.grace.diverges:
        apart = [rank for rank, out in enumerate(outs) if not same_bits(out, outs[0])]
        must(not apart, "equal on all ranks", f"ranks {apart} differ from rank 0")
    odd = [key for state in held for key, array in state.items() if not np.isfinite(array).all()]
    must(not odd, "finite states", f"{odd} are not finite", _keys(odd))
    must(all(d.step == step + 1 for d in run.cluster.drivers), "finite states", "a driver's step is wrong")
    with np.errstate(over="ignore"):
        finite = all(np.isfinite(a.astype(np.float32)).all() for mapping in given for a in mapping.values())
    if not finite and case.rate(step) > 1e-30:  # at rate 0, which smaller ones count as, memories that use it leave the gradient out
        kept = [name for out in outs for name, array in out.items() if not np.isnan(array).all()]
        must(not kept, "not finite: all NaN", f"{kept} have values")
        must(all(same_bits(a, b) for a, b in zip(held, last, strict=True)), "not finite: states kept", "a state changed")
    elif finite and not _large(case):
        odd = [name for out in outs for name, array in out.items() if not np.isfinite(array).all()]
        must(not odd, "finite results", f"{odd} are not finite")
    bound = sum(run.grace.nbytes(spec, case.size) for spec in run.cluster.drivers[0].specs.values())
    for rank, (sent, rest) in enumerate(zip(run.cluster.wire_bytes, run.overhead, strict=True)):
        must(sent <= bound + rest, "bytes within their bound", f"rank {rank} sent {sent}, {rest} of these in headers; the bound is {bound}")
    if finite:
        declared(run, must)
        if not _large(case):
            conserved(run, step, given, last, must)


def _keys(names: list[str]) -> str:
    """Returns the keys of states, without parameters and the places of policies."""
    return ", ".join(sorted({name.split("/")[0].split(":")[-1] for name in names}))


def _large(case: Case) -> bool:
    """Whether sums of gradients, or multiples of them, may leave the range of their dtype."""
    return any(t.kind in ("huge", "wide") or t.dtype == "float16" for t in case.tensors)


def _firsts(run: Run) -> range:
    """Returns the ranks whose memories count: all, or the first one of each node."""
    return range(0, run.case.size, run.case.per_node if run.grace.two_level else 1)


def declared(run: Run, must: Any) -> None:
    """Checks what parts declare of their states: equal on all ranks, on the ranks of a node, or a mean."""
    held, firsts = run.states[-1], _firsts(run)
    if run.grace.two_level:
        parts = [{key: array for key, array in state.items() if not key.startswith("policy")} for state in held]
        nodes = [parts[rank - rank % run.case.per_node] for rank in range(run.case.size)]
        must(all(same_bits(a, b) for a, b in zip(parts, nodes, strict=True)), "equal in a node", "ranks of a node hold unlike states")
    for name, parts in run.cluster.drivers[0].parts.items():
        for key in {key for part in parts for key in part.shared_state if f"{key}/{name}" in held[0]}:
            same = all(state[f"{key}/{name}"].tobytes() == held[0][f"{key}/{name}"].tobytes() for state in held)
            must(same, "shared state equal", f"{key} of {name!r} differs between ranks")
        for mean, own in parts[1].mean_state.items():
            if f"{mean}/{name}" not in held[0] or _large(run.case):
                continue
            arrays = [held[rank][f"{own}/{name}"].astype(np.float64) for rank in firsts]
            off = np.abs(held[0][f"{mean}/{name}"] - sum(arrays) / len(firsts)).max(initial=0)
            limit = run.case.steps * _rounding(run, name, parts) * max(np.abs(a).max(initial=0) for a in arrays) + 1e-37
            must(off <= limit, "means of states", f"{mean} of {name!r} is off by {off:.3g}, allowed is {limit:.3g}")


def _rounding(run: Run, name: str, parts: tuple[Any, Any, Any]) -> float:
    """Returns the relative rounding of a sum of what these parts send: that of 16 bits if a value, or the gradient, has so many."""
    found = [ROUNDING[run.cluster.drivers[0].specs[name].dtype]]
    for part in (parts[0], getattr(parts[0], "select", None), getattr(parts[0], "codec", None), getattr(parts[0], "rest", None)):
        found += [ROUNDING["float16"]] if "fp16" in (getattr(part, "values", ""), getattr(part, "name", "")) else []
        found += [ROUNDING["bfloat16"]] if "bf16" in (getattr(part, "values", ""), getattr(part, "name", "")) else []
    return max(found)


def conserved(run: Run, step: int, given: list[State], last: list[State], must: Any) -> None:
    """Checks that gradient and old residual are result and new residual, in the mean over the ranks: nothing is lost or made up."""
    firsts, held = _firsts(run), run.states[-1]
    for name, (compressor, memory, communicator) in run.cluster.drivers[0].parts.items():
        inner, exact = communicator.inner(compressor), compressor.name == "none"
        plain = memory.name == "residual" and memory.beta == memory.gamma == 1
        plain = plain or memory.name == "powersgd" and len(run.cluster.drivers[0].specs[name].shape) > 1 or memory.name == "ef_star"
        if (
            compressor.result != "mean"
            or not getattr(compressor, "averages", compressor.name != "demo")
            or not (plain or memory.name == "none" and exact)
        ):
            continue
        if inner.name == "reduce_scatter" and (inner.follow_rate or not exact and not inner.keeps_state(compressor)):
            continue

        def mean(states: list[State], key: str, name: str = name) -> Any:
            none = np.zeros(given[0][name].size)
            return sum(states[rank].get(f"{key}/{name}", none).astype(np.float64) for rank in firsts) / len(firsts)

        def whole(states: list[State], name: str = name) -> Any:  # the shards of reduce_scatter's own residual, end to end
            shards = [state.get(f"shard_residual/{name}", np.zeros(0)) for state in states]
            joined = np.concatenate(shards).astype(np.float64)
            return joined if joined.size else np.zeros(given[0][name].size)

        gradient = sum(mapping[name].astype(np.float64).reshape(-1) for mapping in given) / run.case.size
        keys = ("residual",) if plain else ()
        terms = [gradient, *(mean(last, key) for key in keys), whole(last)]
        rest = [run.outs[-1][0][name].astype(np.float64).reshape(-1), *(mean(held, key) for key in keys), whole(held)]
        if inner.name != "reduce_scatter":
            terms, rest = terms[:-1], rest[:-1]
        every = [np.abs(state.get(f"residual/{name}", np.zeros(1))).max(initial=0) for state in (*held, *last)]
        every += [np.abs(mapping[name].astype(np.float64)).max(initial=0) for mapping in given]
        every += [np.abs(term).max(initial=0) for term in (*terms, *rest)]
        off = np.abs(sum(terms) - sum(rest)).max(initial=0)
        rounding = _rounding(run, name, (compressor, memory, communicator))
        limit = rounding * max(every) + (1e-37 if rounding < ROUNDING["float16"] else 1e-7)  # float16's smallest step
        text = f"{name!r}: gradient and residual differ from result and residual by {off:.3g}, allowed is {limit:.3g}"
        must(off <= limit, "conservation", text, f"{compressor.name} + {memory.name} @ {inner.name}")


# --- the same run, otherwise ------------------------------------------------------------------------------------------
def _save(case: Case, cluster: LocalCluster) -> Any:
    if case.load_by == "state_dict":
        return cluster.state_dict()
    folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    grace_ext.save(cluster, folder.name)
    return folder


def check_resume(run: Run, saved: Any, tally: Counter[str]) -> None:
    """Loads what was saved into a new cluster, which must go on as the run did; with another number of ranks, it must go on."""
    case = run.case
    if case.load_by == "resize":
        if run.grace.diverges:  # the ranks' models differ, so that is refused
            return None
        return _check_resize(run, saved, tally)
    assert case.load_at is not None
    other = Run(case, run.grace)
    if case.load_by == "state_dict":
        other.cluster.load_state_dict(saved)
    else:
        step = grace_ext.load(other.cluster, saved.name)
        saved.cleanup()
        if step != case.load_at:
            raise Broken("resume", f"load returned step {step} instead of {case.load_at}")
    if repeatable(run.grace):
        for step in range(case.load_at, case.steps):
            other.step(step, gradients(case, step))
            _same(run, other, step, "resume", tally)


def _check_resize(run: Run, saved: Any, tally: Counter[str]) -> None:
    case = run.case
    size = case.size + 1 if case.data % 2 else max(1, case.size - 1)
    how = ("mean", "keep", "reset")[case.data % 3]
    other = LocalCluster(run.grace, size, ranks_per_node=case.per_node)
    try:
        grace_ext.load(other, saved.name, resize=how)
    except CheckpointError as error:
        if "use resize=" in str(error):  # 'keep' of what is a node's
            return
        raise
    finally:
        saved.cleanup()
    given = (gradients(case, case.steps) * 2)[:size]
    try:
        outs = NUMPY.everywhere(other, given)
    except UnsupportedError as error:
        if "a node counts once" in str(error):
            return
        raise
    tally["resize"] += 1
    if not run.grace.diverges and not all(same_bits(out, outs[0]) for out in outs):
        raise Broken("resize", f"from {case.size} to {size} ranks by {how!r}: results differ between ranks")
    if not _large(case) and not all(np.isfinite(a).all() for a in outs[0].values()):
        raise Broken("resize", f"from {case.size} to {size} ranks by {how!r}: results are not finite")


def check_path(run: Run, tally: Counter[str]) -> None:
    """Repeats the run by another path, whose results and states must have the same bits."""
    case = run.case
    if PATHS[case.path] not in WORLD or not repeatable(run.grace, case.path.removeprefix("torch ")):
        return
    if case.path == "buckets" and (case.bad or _large(case)):
        return  # values that are not finite concern their bucket alone
    other = Run(case, run.grace, case.path)
    for step in range(case.steps):
        other.step(step, gradients(case, step))
        _same(run, other, step, f"path {case.path!r}", tally)


def _same(run: Run, other: Run, step: int, invariant: str, tally: Counter[str]) -> None:
    tally[invariant] += 1
    for what, ours, theirs in (("results", run.outs[step], other.outs[-1]), ("states", run.states[step], other.states[-1])):
        for rank, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if not same_bits(a, b):
                keys = [key for key in {**a, **b} if key not in a or key not in b or _bits(a[key]) != _bits(b[key])]
                if not keys:
                    continue  # a NaN has several bit patterns
                about = _keys(keys) if what == "states" else ""
                raise Broken(invariant, f"step {step}, rank {rank}: {what} differ: {', '.join(map(repr, keys))}", about)


def _bits(array: np.ndarray) -> bytes:
    return b"NaN" if array.size and np.isnan(array).all() else array.tobytes()
