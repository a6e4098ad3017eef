"""A state as bytes: nested dictionaries of JSON values and numpy arrays, in the safetensors format. No pickle.

Arrays are tensors of the file under the keys that lead to them ('state/residual/w'); the dictionaries around them are JSON in the file's
metadata, in which {"tensor": name, "dtype": dtype} stands for an array.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..errors import CheckpointError

VERSION = 1
#: numpy types that safetensors does not know by themselves travel as integers of their size.
CARRIERS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}
KNOWN = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")


def is_array(value: Any) -> bool:
    """Whether a leaf of a state is an array of some library."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def mapped(tree: Any, convert: Callable[[Any], Any]) -> Any:
    """The same with its arrays converted."""
    if isinstance(tree, dict):
        return {key: mapped(value, convert) for key, value in tree.items()}
    return convert(tree) if is_array(tree) else tree


def encode(tree: dict[str, Any]) -> bytes:
    """The file's bytes. Keys are strings; leaves are numpy arrays of any shape, a 0-d or an empty one included, or JSON values."""
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}

    def packed(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {key: packed(inner, (*path, key)) for key, inner in value.items()}
        if not is_array(value):
            return {"json": value}
        name = "/".join(path)
        while name in arrays:  # 'a/b' + 'c' and 'a' + 'b/c'
            name += "'"
        dtype = value.dtype.name
        plain = np.array(value, order="C")  # one of its own: safetensors takes the memory as it lies
        arrays[name] = plain if dtype in KNOWN else plain.reshape(-1).view(CARRIERS[plain.itemsize]).reshape(plain.shape)
        return {"tensor": name, "dtype": dtype}

    layout = packed(tree, ())
    return save(arrays, {"grace_ext": json.dumps({"version": VERSION, "layout": layout})})


def decode(data: bytes) -> dict[str, Any]:
    """The inverse. Raises CheckpointError for what is no such file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        length = int.from_bytes(data[:8], "little")
        about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["grace_ext"])
        if about["version"] != VERSION:
            raise CheckpointError(f"has version {about['version']!r}, expected {VERSION}")
        arrays = load(data)
        return _unpacked(about["layout"], arrays)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"is no state that grace_ext saved ({type(error).__name__}: {error})") from None


def _unpacked(value: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    if set(value) == {"json"}:
        return value["json"]
    if set(value) == {"tensor", "dtype"} and isinstance(value["tensor"], str):
        array = arrays[value["tensor"]]
        return array if value["dtype"] in KNOWN else array.reshape(-1).view(_dtype(value["dtype"])).reshape(array.shape)
    return {key: _unpacked(inner, arrays) for key, inner in value.items()}


def _dtype(name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def driver_states(tree: Any) -> Iterator[dict[str, Any]]:
    """The states of drivers (Driver.state_dict) in a state."""
    if isinstance(tree, dict) and {"spec", "rank", "size", "state"} <= set(tree):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from driver_states(value)
