"""Fits the state of an exchange to another number of ranks: pure functions from the states of all old ranks to those of the new ones.

What was not sent is still owed to the model. The residuals e_1 ... e_n would have reached the aggregate as

    u = (1/n) sum_i e_i        of a mean,            u = sum_i e_i        of a sum (op=Sum),

because a mean over n ranks is divided by n. So u must be kept: if gradients are averaged, the MEAN of the residuals, not their sum. (If two
ranks shared the sum of three ranks' residuals, it would count 3/2 times.) Every new rank j of m gets

    e'_j = u                   of a mean,            e'_j = u / m         of a sum,

in float64, rounded once, which makes the new u equal to the old one. The same holds for every other state of a rank's own that enters the
aggregate linearly: momentum before compression, estimates and shifts (ef21, diana, ef_star).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..communicators.shards import shard_of
from ..composition.composition import Composition
from ..composition.grace import Grace
from ..composition.making import grace
from ..driver.state import check_form
from ..errors import GraceError, ParameterError, shown
from ..parts.part import Part
from ..parts.state import is_own

HOW = ("mean", "keep", "reset")
State = Mapping[str, Any]


def resized(states: Sequence[State], size: int, how: str = "mean", nodes: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns the Driver.state_dict() of each of `size` new ranks, from those of the old ranks, in rank order, with numpy arrays.

    how: 'mean': what was not sent keeps its effect on the aggregate, by the equations above. 'keep': new rank j takes the j-th state; the
      states of further ranks are lost, and additional new ranks start at zero. 'reset': all ranks start at zero.
    nodes: by new rank, a name for its node. With 'hierarchical' all of the above holds for nodes in place of ranks; 'keep', and a sum, need
      to know them.
    States that are missing (a rank died; each state holds the old number of ranks) count as zero: nothing replaces them.
    State that all ranks share (a momentum of the aggregate, powersgd's Q, policies' state, the step) is kept by all three. A key that is
    the mean over the ranks of another key (ef21's `ef21_mean`) is computed anew from that key, so that the two agree. Consecutive shards
    (reduce_scatter's `shard_residual`) are cut anew, or are zero with 'reset'.
    Raises ParameterError for another `how` or a size below 1, and GraceError if the states are not of one exchange at one step, or cannot
    be resized: 'cser' with errors that are not in the models yet, 'keep' with 'ef_star', or with 'hierarchical' without `nodes`.
    """
    if how not in HOW:
        raise ParameterError(f"resize must be one of {', '.join(map(repr, HOW))}, got {shown(how)}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ParameterError(f"the number of ranks must be a whole number, at least 1, got {shown(size)}")
    if nodes is not None and len(nodes) != size:
        raise ParameterError(f"nodes must name the node of each of the {size} ranks, got {len(nodes)} names")
    states = list(states)
    old = _Old(states)
    old.check(how, nodes)
    holders = list(dict.fromkeys(nodes)) if nodes is not None and old.grace.two_level else list(range(size))
    made: list[dict[str, Any]] = [{} for _ in holders]
    for key in old.keys():
        for into, array in zip(made, old.resized_key(key, len(holders), how), strict=True):
            into[key] = array
    for key, source in old.derived():
        mean = _total([state[source] for state in made]) / (len(holders) if old.mean else 1)
        for state in made:
            state[key] = _rounded(mean, state[source])
    about = {key: value for key, value in states[0].items() if key not in ("rank", "size", "state", "node", "nodes")}
    if nodes is None or not old.grace.two_level:
        return [{**about, "rank": rank, "size": size, "state": state} for rank, state in enumerate(made)]
    by_node = dict(zip(holders, made, strict=True))
    copies = [{key: array.copy() for key, array in by_node[node].items()} for node in nodes]
    about["nodes"] = len(holders)
    return [{**about, "rank": rank, "size": size, "node": nodes[rank], "state": state} for rank, state in enumerate(copies)]


def told(before: Sequence[State], after: Sequence[State], how: str) -> str:
    """Describes a resize for the log: the norms, in the aggregate, of what was not sent before and after it, and of the difference."""
    old, new = _Old(before), _Old(after)
    where = f", on {old.size} and {new.size} nodes" if "node" in before[0] and "node" in after[0] else ""
    owed, due, lost = 0.0, 0.0, 0.0
    for key in old.keys():
        if old.kind(key) in ("own", "sharded"):
            was, now = old.effect(key), new.effect(key)
            owed, due, lost = owed + _square(was), due + _square(now), lost + _square(was - now)
    return (
        f"resize={how!r} from {before[0]['size']} to {after[0]['size']} ranks{where}: what they had not sent has norm "
        f"{math.sqrt(owed):.6g} in the aggregate, {math.sqrt(due):.6g} after it; changed by {math.sqrt(lost):.3g}"
    )


class _Old:
    """Holds the states of the old ranks, and the kind of each of their keys. Raises GraceError if the states are not of one step."""

    def __init__(self, states: Sequence[State]):
        if not states:
            raise GraceError("there is no state to resize; pass the states of the old ranks, in rank order")
        for state in states:
            check_form(state)
        first = states[0]
        for state in states[1:]:
            odd = [key for key in ("version", "spec", "seed", "size", "step", "op") if state.get(key) != first.get(key)]
            if odd or set(state["state"]) != set(first["state"]):
                what = ", ".join(f"{key} {first.get(key)!r} and {state.get(key)!r}" for key in odd) or "other parameters or keys"
                raise GraceError(f"the states of ranks {first['rank']} and {state['rank']} are not of one exchange at one step: {what}")
        self.states, self.size, self.mean = states, first["size"], first.get("op", "mean") == "mean"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user saw the warnings when composing it
            self.grace: Grace = grace(first["spec"])
        self._kinds = dict(_kinds(self.grace))
        self._derived = {key: source for part in _parts(self.grace) for key, source in part.mean_state.items()}
        if self.grace.two_level:
            self._one_a_node()

    def _one_a_node(self) -> None:
        """Keeps one state per node, as all ranks of a node hold the node's state. Raises GraceError if the states of ranks are missing, and
        it is not known how many nodes there were."""
        by_node = {state.get("node", state["rank"]): state for state in self.states}  # a resized state may belong to no node yet
        nodes = len(by_node) if len(self.states) == self.size else self.states[0].get("nodes")
        if nodes is None:
            raise GraceError(f"{self.grace} keeps a state per node, but the states of {self.size - len(self.states)} ranks are missing")
        self.states, self.size = list(by_node.values()), nodes

    def check(self, how: str, nodes: Sequence[str] | None) -> None:
        """Raises GraceError if these states cannot be resized in this way."""
        diverging = [memory.name for memory in self.grace.memories if memory.diverges]
        if diverging and any(np.any(_host(x)) for state in self.states for key, x in state["state"].items() if self.kind(key) == "own"):
            raise GraceError(
                f"memory {diverging[0]!r}: the ranks' models differ by what the ranks have not sent, so another number of ranks would need "
                "other models; call sync() on all ranks before saving"
            )
        if self.grace.two_level and nodes is None and (how == "keep" or not self.mean):
            what = "resize='keep'" if how == "keep" else "a sum (op=Sum)"
            raise GraceError(f"{self.grace} keeps a state per node, so {what} needs to know the new ranks' nodes: pass nodes=, by rank")
        if how == "keep" and any(self.kind(key) == "shift" for key in self.keys()):
            raise GraceError("memory 'ef_star': its shifts sum to zero over all ranks, but not over some of them; use resize='mean'")

    def keys(self) -> list[str]:
        return list(self.states[0]["state"])

    def kind(self, key: str) -> str:
        """Returns 'shared', 'borrowed', 'sharded', 'derived', 'shift' or 'own'; 'own' is a rank's part of the aggregate."""
        part = key.split("/", 1)[0]
        return "shared" if is_own(part) else self._kinds.get(part, "own")

    def arrays(self, key: str) -> list[np.ndarray]:
        return [_host(state["state"][key]) for state in self.states]

    def effect(self, key: str) -> np.ndarray:
        """Returns what the ranks' arrays add to the aggregate, float64."""
        if self.kind(key) == "sharded":
            return np.concatenate(self.arrays(key)).astype(np.float64)
        return _total(self.arrays(key)) / (self.size if self.mean else 1)

    def resized_key(self, key: str, size: int, how: str) -> list[np.ndarray]:
        """Returns the array of this key for each of the new ranks."""
        kind, arrays = self.kind(key), self.arrays(key)
        if kind in ("shared", "borrowed", "derived"):
            return [arrays[rank % len(arrays)].copy() for rank in range(size)]
        if kind == "sharded":
            whole = self._whole(key, arrays)
            pieces = [whole[shard_of(key.split("/", 1)[1], len(whole), size, rank)].copy() for rank in range(size)]
            return [np.zeros_like(piece) for piece in pieces] if how == "reset" else pieces
        if how == "mean":
            part = _rounded(self.effect(key) / (1 if self.mean else size), arrays[0])
            return [part.copy() for _ in range(size)]
        kept = [array.copy() for array in arrays[:size]] if how == "keep" else []
        return kept + [np.zeros_like(arrays[0]) for _ in range(size - len(kept))]

    def _whole(self, key: str, arrays: list[np.ndarray]) -> np.ndarray:
        """Joins the shards of all ranks, which follow one another in rank order. Raises GraceError if a shard is missing."""
        if len(arrays) < self.size:
            raise GraceError(f"{key}: the shards of {self.size - len(arrays)} ranks are missing, and their places are not known")
        return np.concatenate(arrays)

    def derived(self) -> Iterator[tuple[str, str]]:
        """Yields each key that is a mean over ranks, and the key whose mean it is."""
        for key in self.keys():
            part, name = key.split("/", 1)
            if part in self._derived:
                yield key, f"{self._derived[part]}/{name}"


def _parts(g: Grace) -> Iterator[Part]:
    for leaf in g.leaves:
        assert isinstance(leaf, Composition)
        for part in (leaf.memory, leaf.compressor, leaf.communicator):
            yield from part.nested()


def _kinds(g: Grace) -> Iterator[tuple[str, str]]:
    for part in _parts(g):
        yield from ((key, "shared") for key in part.shared_state)
        yield from ((key, "borrowed") for key in part.borrowed_state)
        yield from ((key, "sharded") for key in part.sharded_state)
        yield from ((key, "shift") for key in part.zero_sum_state)
        yield from ((key, "derived") for key in part.mean_state)


def _host(array: Any) -> np.ndarray:
    """Returns an array of any library as a numpy array; a torch tensor must be on the CPU."""
    return np.asarray(array)


def _total(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the sum in rank order, float64."""
    total = np.zeros(arrays[0].shape, np.float64)
    for array in arrays:
        total += array
    return total


def _rounded(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return values.astype(like.dtype)


def _square(x: np.ndarray) -> float:
    return float(np.dot(x.ravel(), x.ravel()))
