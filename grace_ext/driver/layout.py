"""Buckets: which parameters travel together, in which order, and the digest that names them in the headers of messages."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..composition.grace import Grace
from ..compressors.forms.merged import SMALL
from ..errors import NamesError, TensorChangedError, UnsupportedDtypeError, few, shown
from ..parts.ops import Array, Flag
from ..parts.tensor import DTYPES, TensorSpec

if TYPE_CHECKING:
    from ..composition.composition import Parts

BUCKET_BYTES = 25 * 2**20


class Bucket:
    """Consecutive parameters that travel in one message, and the exchange under way for them."""

    def __init__(self, specs: list[TensorSpec]):
        self.specs = sorted(specs, key=lambda spec: spec.whole.size > SMALL)  # small neighbours can be merged (exchange/merge.py)
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
        self.finite: Flag = True  # on every rank


def check_names(names: Iterable[Any]) -> None:
    """Raises NamesError for a parameter's name that is no string or no valid text, or that is given twice."""
    names = list(names)
    for place, name in enumerate(names):
        if not isinstance(name, str):
            raise NamesError(
                f"parameter names must be strings, got {shown(name)} ({type(name).__name__}) in place {place}: ranks compare them as "
                "text; use str(...)"
            )
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise NamesError(
                f"parameter names must be valid text, got {shown(name)} in place {place}, whose character {error.start} is a lone "
                "surrogate: names are hashed and saved as UTF-8; rename the parameter"
            ) from None
    if len(set(names)) < len(names):
        twice = (shown(name, 40) for name, count in Counter(names).items() if count > 1)
        raise NamesError(f"parameter names must be unique; given more than once: {few(twice)}")


def checked(specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    """Returns the specs by name. Raises NamesError as `check_names` does, UnsupportedDtypeError for gradients that are not floating
    point."""
    specs = list(specs)
    check_names(spec.name for spec in specs)
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


def in_buckets(specs: Sequence[TensorSpec], pack: Callable[[Mapping[str, int]], list[list[str]]]) -> list[list[str]]:
    """Returns the names of each bucket's parameters, last parameters first.

    Matrices whose rows ranks share have buckets of their own, packed by the bytes of the whole: all ranks that hold rows of them make
    the same buckets, in one order, and each of these takes as many rounds on one rank as on the other."""
    place = {spec.name: i for i, spec in enumerate(reversed(specs))}
    apart = {spec.name: spec.nbytes for spec in reversed(specs) if spec.rows is None}
    shared = {spec.name: spec.whole.nbytes // len(spec.rows.counts) for spec in reversed(specs) if spec.rows is not None}
    return sorted([*pack(apart), *pack(shared)], key=lambda names: place[names[-1]])


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
