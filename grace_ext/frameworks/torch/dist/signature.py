"""Describes what all ranks must have in common when they start a collective, and says how they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ....errors import few

RULE = (
    "All ranks of a process set must start the same collectives in the same order, with equal names, options, dtypes, devices and shapes "
    "(in allgather and alltoall the first dimension may differ)"
)


class TensorSignature(NamedTuple):
    """Holds what the ranks compare of one tensor. `shape` has "*" for a dimension that may differ. If the value is no dense tensor,
    `device` is '' and `dtype` says what it is."""

    dtype: Any
    shape: tuple[int | str, ...]
    device: str
    note: str = ""
    name: str = ""

    def __str__(self) -> str:
        name, note = f"{self.name!r}: " if self.name else "", f" ({self.note})" if self.note else ""
        where = f"[{', '.join(map(str, self.shape))}] on {self.device}" if self.device else ""
        return f"{name}{str(self.dtype).removeprefix('torch.')}{where}{note}"


class Signature(NamedTuple):
    """Holds what the ranks compare of a collective."""

    kind: str
    name: str | None
    options: tuple[tuple[str, Any], ...]
    tensors: tuple[TensorSignature, ...]

    def __str__(self) -> str:
        return self.text(self.tensors)

    def text(self, tensors: Sequence[TensorSignature]) -> str:
        """Describes the collective in words, and these of its tensors."""
        name = repr(self.name) if self.name else "without a name"
        options = f" ({', '.join(f'{option} {value}' for option, value in self.options)})" if self.options else ""
        many = f"{len(self.tensors)} tensors: " if len(self.tensors) > 1 else ""
        return f"{self.kind} {name}{options}{f' of {many}{few(map(str, tensors))}' if tensors else ''}"

    def digest(self) -> bytes:
        """Returns 16 bytes that are equal on all ranks with equal signatures."""
        return digest(repr(tuple(self)).encode())


class Started(NamedTuple):
    """A collective that a rank has started: its number in these process groups, and whether the ranks compare it before they launch it."""

    number: int
    signature: Signature
    compared: bool


def first_difference(everyone: Sequence[Sequence[Started]], ranks: Sequence[int], label: str) -> tuple[int, str]:
    """Returns the first number under which these ranks have started different collectives, and an error's text that says how they differ.
    `everyone` holds the latest collectives of each rank."""
    by_rank = [{number: signature for number, signature, _ in latest} for latest in everyone]
    numbers = sorted(set().union(*by_rank))
    number = next((n for n in numbers if len({started.get(n) for started in by_rank}) > 1), numbers[-1])
    signatures = [started.get(number) for started in by_rank]
    there = [signature for signature in signatures if signature is not None]
    # Among many tensors, only those are shown that differ, if nothing else does.
    alike = len(there) == len(signatures) and len({(signature[:3], len(signature.tensors)) for signature in there}) == 1
    differ = [i for i, tensors in enumerate(zip(*(signature.tensors for signature in there), strict=False)) if len(set(tensors)) > 1]
    by_text: dict[str, list[str]] = {}
    for rank, signature in zip(ranks, signatures, strict=True):
        if signature is None:
            text = "nothing"
        else:
            text = signature.text([signature.tensors[i] for i in differ] if alike else signature.tensors)
        by_text.setdefault(text, []).append(str(rank))
    said = "; ".join(f"{'ranks' if len(those) > 1 else 'rank'} {few(those)}: {text}" for text, those in by_text.items())
    return number, f"The ranks have started different collectives as number {number} of {label}. {said}. {RULE}"


def digest(data: bytes) -> bytes:
    """Returns a digest of 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()
