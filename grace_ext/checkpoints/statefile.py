"""Encodes a state, nested dictionaries of JSON values and numpy arrays, as bytes in the safetensors format. No pickle.

Arrays are tensors of the file, named by the path of keys that leads to them ('state/residual/w'). The dictionaries are JSON in the file's
metadata, in which {"tensor": name, "dtype": dtype} stands for an array.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..arrays.numpy import native
from ..errors import CheckpointError

VERSION = 1
#: The integer type, by its bytes, that carries a numpy type which safetensors does not know.
CARRIERS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}
KNOWN = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")


def is_array(value: Any) -> bool:
    """Whether a leaf of a state is an array, of any library."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def mapped(tree: Any, convert: Callable[[Any], Any]) -> Any:
    """Returns the same tree with its arrays converted."""
    if isinstance(tree, dict):
        return {key: mapped(value, convert) for key, value in tree.items()}
    return convert(tree) if is_array(tree) else tree


def encode(tree: dict[str, Any]) -> bytes:
    """Returns the file's bytes. Keys must be strings; leaves are numpy arrays of any shape, also 0-d or empty, or JSON values."""
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}

    def packed(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {key: packed(inner, (*path, key)) for key, inner in value.items()}
        if not is_array(value):
            return {"json": value}
        name = "/".join(path)
        while name in arrays:  # 'a/b' + 'c' and 'a' + 'b/c' give the same name
            name += "'"
        dtype = value.dtype.name
        plain = np.array(value, native(value.dtype), order="C")  # a contiguous copy: safetensors saves the memory as it lies
        arrays[name] = plain if dtype in KNOWN else plain.reshape(-1).view(CARRIERS[plain.itemsize]).reshape(plain.shape)
        return {"tensor": name, "dtype": dtype}

    layout = packed(tree, ())
    return save(arrays, {"grace_ext": json.dumps({"version": VERSION, "layout": layout})})


def decode(data: bytes) -> dict[str, Any]:
    """Inverts `encode`. Raises CheckpointError for bytes that are not such a file."""
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
        raise CheckpointError(f"is not a state that grace_ext saved ({type(error).__name__}: {error})") from None


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
    """Yields the states of drivers (Driver.state_dict) in a tree."""
    if isinstance(tree, dict) and {"spec", "rank", "size", "state"} <= set(tree):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from driver_states(value)
