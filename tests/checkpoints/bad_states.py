"""Makes states that cannot be loaded from a good one, for tests of every API."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grace_ext.checkpoints.files import MANIFEST, digest
from grace_ext.checkpoints.statefile import decode, driver_states, encode, mapped

Change = Callable[[dict[str, Any], str], Any]


def _array(change: Callable[[np.ndarray], Any]) -> Change:
    """Returns a change of the array under a key."""

    def changed(state: dict[str, Any], key: str) -> None:
        state["state"][key] = change(state["state"][key])

    return changed


def _with_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[len(array) // 2] = np.nan
    return array


def _without(entry: str) -> Change:
    return lambda state, key: state.pop(entry) and None


def _extra(path: str) -> Change:
    return lambda state, key: state["state"].update({path.format(key.split("/", 1)[1]): state["state"][key]})


#: By name: what is wrong with a driver's state, and what the error must say. '{key}' and '{name}' stand for those of the array.
FORM: dict[str, tuple[Change, str]] = {
    "a list": (_array(lambda x: x.tolist()), "{key}' of '{name}' is a list"),
    "half": (_array(lambda x: x.astype(np.float16)), "{key}' of '{name}' is float16"),
    "other byte order": (_array(lambda x: x.astype(">f4")), "{key}' of '{name}' is >f4"),
    "text": (_array(lambda x: "x"), "{key}' of '{name}' is a str"),
    "two dimensions": (_array(lambda x: x.reshape(1, -1)), "{key}' of '{name}' is float32[1, "),
    "a number": (_array(lambda x: np.float32(1)), "{key}' of '{name}' is float32[]"),
    "NaN": (_array(_with_nan), "{key}' of '{name}' has NaN or Inf"),
    "Inf": (_array(lambda x: np.full_like(x, -np.inf)), "{key}' of '{name}' has NaN or Inf"),
    "no arrays": (_without("state"), "lacks 'state'"),
    "no step": (_without("step"), "lacks 'step'"),
    "no spec": (_without("spec"), "lacks 'spec'"),
    "a step that is no number": (lambda state, key: state.update(step=np.nan), "step nan"),
    "a negative step": (lambda state, key: state.update(step=-1), "step -1"),
    "another version": (lambda state, key: state.update(version=2), "version 2"),
    "another spec": (lambda state, key: state.update(spec="none @ allreduce"), "'none @ allreduce'"),
    "another seed": (lambda state, key: state.update(seed=99), "seed 99"),
    "a list of arrays": (lambda state, key: state.update(state=[1, 2]), "[1, 2]"),
    "a key without parameter": (lambda state, key: state["state"].update(x=state["state"][key]), "'x'"),
    "a key that is no string": (lambda state, key: state["state"].update({3: state["state"][key]}), "3"),
}
#: The same; these are found once the parameters are known.
FIT: dict[str, tuple[Change, str]] = {
    "float64": (_array(lambda x: x.astype(np.float64)), "'{name}' has '{key}' as float64["),
    "too short": (_array(lambda x: x[1:]), "'{name}' has '{key}' as float32["),
    "too long": (_array(lambda x: np.concatenate([x, x])), "'{name}' has '{key}' as float32["),
    "a key too many": (_extra("nonsense/{}"), "'{name}' has 'nonsense'"),
    "a parameter too many": (_extra("residual/no such parameter"), "'no such parameter'"),
}
#: The same; these are found once it is known which parameters have gradients.
WHOLE: dict[str, tuple[Change, str]] = {"a key too few": (lambda state, key: state["state"].pop(key) is None, "'{name}' lacks '{key}'")}
#: What is no state at all.
NOTHING: tuple[Any, ...] = (None, {}, [], "state", 3, {"state": {}}, {"ranks": []}, [{}])


def _keys(state: dict[str, Any]) -> list[str]:
    """Returns the keys of arrays that are no policy's, and that can be cut."""
    return [key for key, array in state["state"].items() if ":" not in key.split("/", 1)[0] and len(array) > 3]


def of(tree: dict[str, Any], changes: dict[str, tuple[Change, str]], prefer: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields (name, bad state, text of the error) for each change of a good state, the state of a driver or a tree that contains some.
    prefer: the parameter whose array is changed, if it has one."""
    place = next(i for i, state in enumerate(driver_states(tree)) if _keys(state))
    for name, (change, text) in changes.items():
        bad = mapped(tree, lambda x: np.array(x))
        state = list(driver_states(bad))[place]
        keys = _keys(state)
        key = next((key for key in keys if key.split("/", 1)[1] == prefer), keys[0])
        change(state, key)
        yield name, bad, text.replace("{key}", key.split("/", 1)[0]).replace("{name}", key.split("/", 1)[1])


def damage(folder: Path, into: Path, rank: int, change: Change) -> None:
    """Copies a checkpoint, with this change in the file of one rank, and a manifest that describes the changed file."""
    into.mkdir(parents=True)
    manifest = json.loads((folder / MANIFEST).read_text())
    for number, entry in enumerate(manifest["files"]):
        data = (folder / entry["name"]).read_bytes()
        if number == rank:
            tree = decode(data)
            state = next(state for state in driver_states(tree) if state["state"])
            change(state, next(key for key in state["state"] if ":" not in key.split("/", 1)[0]))
            data = encode(tree)
            entry.update(bytes=len(data), blake2b=digest(data))
        (into / entry["name"]).write_bytes(data)
    (into / MANIFEST).write_text(json.dumps(manifest))
