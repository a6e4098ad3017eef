"""Buckets: which parameters travel together, in which order, and the digest that names them in the headers of messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..composition.grace import Grace
from ..compressors.forms.merged import SMALL
from ..errors import NamesError, TensorChangedError, UnsupportedDtypeError, few
from ..parts.ops import Array
from ..parts.tensor import DTYPES, TensorSpec

if TYPE_CHECKING:
    from ..composition.composition import Parts

BUCKET_BYTES = 25 * 2**20


class Bucket:
    """Consecutive parameters that travel in one message, and the exchange under way for them."""

    def __init__(self, specs: list[TensorSpec]):
        self.specs = sorted(specs, key=lambda spec: spec.size > SMALL)  # small tensors next to each other can be merged (exchange/merge.py)
        self.names = frozenset(spec.name for spec in specs)
        self.digest, self.number = 0, 0
        self.clear()

    def clear(self) -> None:
        """Forgets the step under way."""
        self.running: Generator[Any, Any, Any] | None = None
        self.waiting: list[str] = []
        self.turn = 0
        self.missing = len(self.specs)  # gradients that are still to come in this step
        self.buffers: list[Array] = []  # the arrays of its collectives in this step
        self.outputs: dict[str, Any] = {}
        self.states: dict[str, dict[str, Array]] = {}
        self.finite = True  # on every rank


def checked(specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    """Returns the specs by name. Raises NamesError for a name that is no string or given twice, UnsupportedDtypeError for gradients that
    are not floating point."""
    specs = list(specs)
    names = [spec.name for spec in specs]
    for name in names:
        if not isinstance(name, str):
            raise NamesError(
                f"parameter names must be strings, got {name!r} ({type(name).__name__}): ranks compare them as text; use str(...)"
            )
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise NamesError(f"parameter names must be unique; given more than once: {', '.join(twice)}")
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise UnsupportedDtypeError(
                f"the gradient of {spec.name!r} is {spec.dtype}; only floating point gradients ({', '.join(DTYPES)}) can be compressed"
            )
    return {spec.name: spec for spec in specs}


def check_tensor(specs: Mapping[str, TensorSpec], name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Raises NamesError or TensorChangedError if such a tensor is not what was registered under its name."""
    spec = specs.get(name)
    if spec is None:
        raise NamesError(f"unknown parameter {name!r}; this exchange was set up for: {few(specs)}")
    if (shape, dtype) != (spec.shape, spec.dtype):
        raise TensorChangedError(
            f"{name!r} was {spec.dtype}{list(spec.shape)} and is now {dtype}{list(shape)}; "
            "state is kept by name, so shapes and dtypes must stay (a new model needs a new optimizer)"
        )


def packed(nbytes: Mapping[str, int], limit: float) -> list[list[str]]:
    """Splits these parameters, given in order with their bytes, into runs of at most `limit` bytes (or one parameter): small enough that
    one bucket's network time overlaps with another's computing time."""
    groups: list[list[str]] = []
    held = 0
    for name, size in nbytes.items():
        if not groups or held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def one_bucket_because(grace: Grace) -> str:
    """Returns why all parameters must travel in one bucket, for an error message; '' if they need not."""
    parts = [part for leaf in grace.leaves for part in (leaf.compressor, leaf.memory) if part.whole_model]
    if not parts:
        return ""
    return (
        f"{parts[0]} looks at the gradients of the whole model at once, and here they are exchanged in several buckets: make one "
        "bucket (DDP: bucket_cap_mb larger than the model), use the wrapper's DistributedOptimizer, or a part that works tensor by "
        "tensor"
    )


def digest(grace: Grace, specs: Sequence[TensorSpec], parts: Mapping[str, Parts]) -> int:
    """Returns 64 bits that name the spec, the seed, these tensors, and, with a policy, what each of them goes through."""
    about = [[s.name, s.shape, s.dtype] for s in specs]
    if grace.policy:
        about += [[str(part) for part in parts[s.name]] for s in specs]
    text = json.dumps([str(grace), grace.seed, about])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
