"""What ranks tell each other to find out whether they do the same: what they would exchange, and, when asked, their parameters.

Three checks, by what they cost:
  at every step     the digest in the header of each gathered message (payload.py); nothing
  at the first step `agree`: spec, seed, parameters, buckets, step, version; one small gather
  when asked        `compare`: the same again, and a digest of every parameter's bits; one gather of some 30 bytes a parameter
Sums carry no header, so `compare` is what finds ranks that part after the first step where a compressor is all-reduced.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DisagreementError, PayloadError
from .exchange.effects import Collective, Effects
from .exchange.message import VERSION, message, open_message, open_text
from .exchange.perform import at_once
from .parts.ops import Ops

if TYPE_CHECKING:
    from .exchange.transport import Transport

#: What ranks say of themselves and need not have in common.
OWN = {"number": 0, "node": "", "saved_on": "", "judges": False}
DIGESTS = "digests of parameters"
NONSENSE = "is not a rank's description of itself"
FIX = (
    "Give every rank the same start (hvd.broadcast_parameters and hvd.broadcast_optimizer_state, or the checkpoint of one step), and let "
    "no rank change parameters by itself"
)


def agree(ops: Ops, transport: Transport, mine: dict[str, Any]) -> Effects:
    """What every rank says of itself ('spec', 'seed', 'parameters', 'number', ...), by rank. Raises DisagreementError, on every rank
    alike, where anything else differs than what is each rank's OWN."""
    said = yield from _told_by_all(ops, transport, {**mine, "version": VERSION})
    if any({**other, **OWN} != {**said[0], **OWN} for other in said):
        raise DisagreementError(difference(said), said)
    for rank, other in enumerate(said):
        if not set(mine) <= set(other):  # one without compression does not say it all, but it differs in what was compared above
            raise PayloadError(NONSENSE, rank)
    return said


def _told_by_all(ops: Ops, transport: Transport, mine: dict[str, Any]) -> Effects:
    """`tell`, where what is used of it here has the right types. Raises PayloadError naming the rank."""
    said = yield from tell(ops, transport, mine)
    for rank, other in enumerate(said):
        number, parameters = other.get("number", 0), other.get("parameters", [])
        if not (
            {"spec", "seed", "version", DIGESTS} & set(mine) <= set(other)
            and isinstance(number, int) and 0 <= number < 2**53
            and isinstance(other.get("node", ""), str) and isinstance(other.get("saved_on", ""), str)
            and isinstance(parameters, list) and all(isinstance(p, list) and p and isinstance(p[0], str) for p in parameters)
            and isinstance(other.get(DIGESTS, {}), dict)
        ):  # fmt: skip
            raise PayloadError(NONSENSE, rank)
    return said


def compare(ops: Ops, transport: Transport, mine: dict[str, Any], digests: Mapping[str, str]) -> Effects:
    """`agree` again, and whether the ranks' parameters are the same bits, by their digests (see `digest_of`). Raises DisagreementError, on
    every rank alike, naming the ranks and the parameters."""
    said = yield from _told_by_all(ops, transport, {**mine, "version": VERSION, DIGESTS: dict(digests)})
    found = [other.pop(DIGESTS) for other in said]
    if any({**other, **OWN} != {**said[0], **OWN} for other in said):
        raise DisagreementError(difference(said), said)
    if any(digests != found[0] for digests in found):
        raise DisagreementError(_different_values(found), [{"digests": digests} for digests in found])


def digest_of(array: np.ndarray) -> str:
    """Of an array's type, shape and bits: 16 hexadecimal digits of BLAKE2b."""
    array = np.ascontiguousarray(array)
    hashed = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=8)
    hashed.update(array.reshape(-1).view(np.uint8))
    return hashed.hexdigest()


def tell(ops: Ops, transport: Transport, mine: dict[str, Any]) -> Effects:
    """What every rank tells the others, made of JSON types: a list by rank."""
    text = ops.upload(np.frombuffer(json.dumps(mine).encode(), np.uint8).copy())
    collective = Collective("allgather", message(ops, [text], digest=0, step=0, finite=True), "agree")
    received = yield from at_once(transport, collective, "grace/agree")
    bodies = [open_message(ops, data, digest=0, step=0, rank=rank)[0] for rank, data in enumerate(received)]
    return [open_text(ops, body, rank) for rank, body in enumerate(bodies)]


def few(names: Iterable[str]) -> str:
    """The first five of them."""
    shown = list(itertools.islice(names, 6))
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")


def difference(said: list[dict]) -> str:
    """What differs between the ranks, in words."""

    def what(other: dict) -> str:
        return f"uses {other['spec']!r} (seed {other['seed']}, op {other.get('op')}, payload version {other['version']})"

    lines = [f"rank 0 {what(said[0])}"]
    for rank, other in enumerate(said):
        if what(other) != what(said[0]):
            lines.append(f"rank {rank} {what(other)}")
        elif other.get("parameters") != said[0].get("parameters"):
            first, its = ({p[0]: p[1:] for p in x.get("parameters", [])} for x in (said[0], other))
            differing = [n for n in {**first, **its} if first.get(n) != its.get(n)]
            names = few(differing) if differing else "the order of the parameters"
            lines.append(f"rank {rank} has other parameters than rank 0: {names}")
        elif other.get("buckets") == said[0].get("buckets") and other.get("digests") != said[0].get("digests"):
            lines.append(f"rank {rank} is at another place of the policy's schedule; load the state of the same step on all ranks")
        elif other.get("step") != said[0].get("step"):
            steps = f"rank {rank} is at step {other.get('step')}, rank 0 at step {said[0].get('step')}"
            lines.append(f"{steps}; load the state of the same step on all ranks")
        elif {**other, **OWN} != {**said[0], **OWN}:
            lines.append(f"rank {rank} packs the parameters into other buckets than rank 0")
    return "ranks compress differently; make every rank run the same script:\n  " + "\n  ".join(lines)


def _different_values(found: list[dict[str, str]]) -> str:
    """Which ranks' parameters are not those of the most ranks (of as many, of the group with rank 0)."""
    kinds = Counter(json.dumps(digests, sort_keys=True) for digests in found)
    usual = json.loads(kinds.most_common(1)[0][0])
    lines = []
    for rank, digests in enumerate(found):
        other = [name for name in {**usual, **digests} if usual.get(name) != digests.get(name)]
        if other:
            lines.append(f"rank {rank}: {len(other)} of {len(usual)} parameters differ: {few(other)}")
    same = ", ".join(str(rank) for rank, digests in enumerate(found) if digests == usual)
    lines = [f"rank {same}: taken as right", *lines]
    return f"the ranks' parameters are not the same bits. {FIX}.\n  " + "\n  ".join(lines)
