"""`Resharding`: makes the memory of this rank's shards from that of the shards of another mesh, which saved a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...arrays.numpy import NumpyOps
from ...composition.grace import Grace
from ...driver.choices import Choices
from ...errors import GraceError, UnsupportedError
from ...exchange.tensor import initial_state
from ...parts.tensor import Rows, StepInfo, TensorSpec
from .guards import local_of
from .ops import describe
from .shards import place_of


def rows_of(shard: int, shards: int, count: int) -> tuple[int, int]:
    """Returns the first row of a shard, and the one after its last, of `count` rows that fully_shard cuts into this many shards."""
    size = -(-count // shards)
    return min(shard * size, count), min((shard + 1) * size, count)


class Resharding:
    """From `before` saved shards to this rank's, on a shard mesh of one dimension. Raises UnsupportedError if the exchange keeps something
    that cannot be cut.

    What a memory keeps of each element goes to the shard that has the element now. What a compressor has learnt of a shard as a whole
    (powersgd's Q) starts anew; what it has learnt of a matrix whose shards share it goes on.

    rows: by name, the matrices whose shards share Q."""

    def __init__(self, g: Grace, parameters: Mapping[str, Any], before: int, rows: Mapping[str, Rows]):
        if g.policy:
            raise UnsupportedError(f"{g}: what a policy has chosen is for the shards that it saw; load it on as many shards as saved it")
        if any(p.device_mesh.ndim != 1 for p in parameters.values()):
            raise UnsupportedError("with tensor parallelism, memory is loaded on the same meshes that saved it")
        self._grace, self._parameters, self._before, self._rows = g, parameters, before, rows
        self._by_element, self._constant = _sort_keys(g)
        #: The saved shards that have rows of this rank's, and the names of their places.
        self.needed = [shard for shard in range(before) if any(self._common(shard, p)[0] for p in parameters.values())] or [0]
        self.places = [place_of((shard,), (before,)) for shard in self.needed]

    def _common(self, shard: int, parameter: Any) -> tuple[int, slice]:
        """Returns how many rows a saved shard has in common with this rank's, and which of the saved shard's rows they are."""
        dim, mesh = parameter.placements[0].dim, parameter.device_mesh
        first, end = rows_of(shard, self._before, parameter.shape[dim])
        own_first, own_end = rows_of(mesh.get_local_rank(), mesh.size(), parameter.shape[dim])
        begin, stop = max(first, own_first), min(end, own_end)
        return max(0, stop - begin), slice(begin - first, stop - first)

    def joined(self, memories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns a replica's Driver.state_dict() for this rank's shards, from those of the `needed` shards (with numpy arrays)."""
        odd = [key for key in ("spec", "seed", "step") if any(memory[key] != memories[0][key] for memory in memories)]
        if odd:
            raise GraceError(f"the shards of this checkpoint were not saved together: they differ in {', '.join(odd)}")
        state: dict[str, Any] = {}
        info = StepInfo(memories[0]["step"], 0, memories[0]["size"], memories[0]["size"], self._grace.seed, None)
        for name, parameter in self._parameters.items():
            spec = TensorSpec(name, *describe(local_of(parameter)), self._rows.get(name))
            if spec.empty or not any(path.split("/", 1)[1] == name for memory in memories for path in memory["state"]):
                continue  # what is empty, or has had no step yet, has no memory
            for key, fresh in initial_state(NumpyOps(), spec, self._grace.parts_for(spec), info).items():
                path = f"{key}/{name}"
                saved = [memory["state"][path] for memory in memories if path in memory["state"]]
                if key in self._by_element and spec.size:
                    state[path] = self._cut(path, parameter, memories)
                elif key in self._constant or spec.rows and saved:  # the learning rate of a residual, for example; Q of all shards
                    state[path] = saved[0]
                else:
                    state[path] = fresh
        return {**memories[0], "state": state}

    def _cut(self, path: str, parameter: Any, memories: Sequence[Mapping[str, Any]]) -> np.ndarray:
        dim, pieces = parameter.placements[0].dim, []
        for shard, memory in zip(self.needed, memories, strict=True):
            count, rows = self._common(shard, parameter)
            if not count:
                continue
            shape = list(parameter.shape)
            first, end = rows_of(shard, self._before, shape[dim])
            shape[dim] = end - first
            array = memory["state"].get(path)
            if array is None or array.size != np.prod(shape):
                raise GraceError(f"shard {shard} of this checkpoint has no {path!r} of shape {shape}: it was saved for other parameters")
            pieces.append(array.reshape(shape)[(slice(None),) * dim + (rows,)])
        return np.concatenate(pieces, dim).reshape(-1)


def _sort_keys(g: Grace) -> tuple[set[str], set[str]]:
    """Returns the keys of the arrays that have a value for each element of the tensor, and of those whose length is always the same. Raises
    UnsupportedError for what a rank keeps of its own in another form."""
    found: list[tuple[int, dict[str, Any]]] = []
    for shape in ((5, 7), (6, 11)):
        spec = TensorSpec("probe", shape, "float32")
        found.append((spec.size, initial_state(NumpyOps(), spec, g.parts_for(spec), StepInfo(0, 0, 2, 2, g.seed, None))))
    keys = set(found[0][1])
    by_element = {key for key in keys if all(len(arrays[key]) == size for size, arrays in found)}
    constant = {key for key in keys if len({len(arrays[key]) for _, arrays in found}) == 1}
    among_ranks = {key for leaf in g.leaves for key in leaf.communicator.sharded_state}
    odd = (keys - by_element - constant - set(Choices(g).shared())) | (among_ranks & keys)
    if odd:
        raise UnsupportedError(f"{g} keeps {', '.join(sorted(odd))} for a shard as a whole; load it on as many shards as saved it")
    return by_element, constant
