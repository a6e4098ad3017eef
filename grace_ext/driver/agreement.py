"""How ranks find out that they do the same: they compare what each would exchange and, when asked, the bits of their parameters.

There are three checks, by cost:
  at every step      the digest in the header of each gathered message (exchange/message.py): no extra bytes
  at the first step  `agree`: spec, seed, parameters, buckets, step, version, and a digest of every parameter's bits; one small gather, of
                     some 30 bytes per parameter
  when asked         the same again
Summed arrays carry no header, only one bit of the digest, so the last check is what finds ranks that diverge after the first step with an
all-reduced compressor.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from ..arrays.numpy import native
from ..errors import DisagreementError, GraceError, PayloadError, few
from ..exchange.effects import Collective
from ..exchange.message import VERSION, message, open_message, open_text
from ..exchange.perform import at_once
from ..exchange.transport import Transport
from ..parts.ops import Ops

#: What ranks say of themselves, by rank.
Descriptions = list[dict[str, Any]]
#: By rank: the digests of its parameters, by name; None for a rank that compares none.
Values = list[dict[str, str] | None]
#: What ranks say of themselves that may differ from rank to rank.
OWN = {"number": 0, "node": "", "saved_on": "", "judges": False}
DIGESTS = "digests of parameters"
NONSENSE = "is not a rank's description of itself"
FIX = (
    "Give every rank the same start (hvd.broadcast_parameters and hvd.broadcast_optimizer_state, or the checkpoint of one step), and let "
    "no rank change parameters by itself"
)
FIX_START = (
    "The ranks would train different models. Give all ranks the parameters of one before the first step (PyTorch: "
    "hvd.broadcast_parameters(model.state_dict(), root_rank=0); Keras: hvd.callbacks.BroadcastGlobalVariablesCallback(0); TensorFlow: "
    "hvd.broadcast_variables(model.variables, root_rank=0)), or load the checkpoint of one step on every rank (check_start=False turns "
    "this check off)"
)


def agree(
    ops: Ops, transport: Transport, mine: dict[str, Any], digests: Mapping[str, str] | None = None
) -> Generator[Any, Any, tuple[Descriptions, Values]]:
    """Gathers every rank's description of itself ('spec', 'seed', 'parameters', 'number', ...) and compares them. Raises DisagreementError,
    on every rank alike, if anything differs but what is each rank's OWN. Returns (the descriptions, the ranks' digests).

    digests: `digest_of` each parameter, by name, for `check_values`; None if this rank compares none."""
    said = yield from _checked(ops, transport, {**mine, "version": VERSION, **({} if digests is None else {DIGESTS: dict(digests)})})
    found = [other.pop(DIGESTS, None) for other in said]
    if any({**other, **OWN} != {**said[0], **OWN} for other in said):
        raise DisagreementError(difference(said), said)
    for rank, other in enumerate(said):
        if not set(mine) <= set(other):  # a rank without compression says less, but it differs in what was compared above
            raise PayloadError(NONSENSE, rank)
    return said, found


def differ(values: Values) -> bool:
    """Whether the ranks' parameters differ, among the ranks that compare them."""
    given = [digests for digests in values if digests is not None]
    return any(digests != given[0] for digests in given)


def check_values(values: Values, fix: str = FIX) -> None:
    """Raises DisagreementError, naming ranks and parameters, if the ranks' parameters differ. fix: what the user can do then."""
    if differ(values):
        raise DisagreementError(_different_values(values, fix), [{"digests": digests} for digests in values])


def _checked(ops: Ops, transport: Transport, mine: dict[str, Any]) -> Generator[Any, Any, Descriptions]:
    """`share`, with the types checked that are used here. Raises PayloadError, naming the rank."""
    said = yield from share(ops, transport, mine)
    for rank, other in enumerate(said):
        number, parameters, sparse = other.get("number", 0), other.get("parameters", []), other.get("sparse", [])
        if not (
            {"spec", "seed", "version"} & set(mine) <= set(other)
            and isinstance(number, int) and 0 <= number < 2**53
            and isinstance(other.get("node", ""), str) and isinstance(other.get("saved_on", ""), str)
            and isinstance(parameters, list) and all(isinstance(p, list) and p and isinstance(p[0], str) for p in parameters)
            and isinstance(sparse, list) and all(isinstance(name, str) for name in sparse)
            and isinstance(other.get(DIGESTS, {}), dict)
        ):  # fmt: skip
            raise PayloadError(NONSENSE, rank)
    return said


def digest_of(array: np.ndarray) -> str:
    """Returns 16 hexadecimal digits of BLAKE2b over an array's type, shape and bits; the byte order in memory does not matter."""
    array = np.ascontiguousarray(array, native(array.dtype))
    hashed = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=8)
    hashed.update(array.reshape(-1).view(np.uint8))
    return hashed.hexdigest()


def share(ops: Ops, transport: Transport, mine: dict[str, Any]) -> Generator[Any, Any, Descriptions]:
    """Gives every rank every rank's dictionary, made of JSON types: a list by rank."""
    text = ops.upload(np.frombuffer(json.dumps(mine).encode(), np.uint8).copy())
    collective = Collective("allgather", message(ops, [text], digest=0, step=0, finite=True), "agree")
    received = yield from at_once(transport, collective, "grace/agree")
    bodies = [open_message(ops, data, digest=0, step=0, rank=rank)[0] for rank, data in enumerate(received)]
    return [open_text(ops, body, rank) for rank, body in enumerate(bodies)]


def difference(said: Descriptions) -> str:
    """Says in words what differs between the ranks."""

    def what(other: dict[str, Any]) -> str:
        return f"uses {other['spec']!r} (seed {other['seed']}, op {other.get('op')}, payload version {other['version']})"

    lines = [f"rank 0 {what(said[0])}"]
    for rank, other in enumerate(said):
        if what(other) != what(said[0]):
            lines.append(f"rank {rank} {what(other)}")
        elif other.get("parameters") != said[0].get("parameters"):
            first, its = ({p[0]: p[1:] for p in x.get("parameters", [])} for x in (said[0], other))
            lines.append(f"rank {rank} has other parameters than rank 0: {_other_parameters(first, its)}")
        elif other.get("sparse") != said[0].get("sparse"):
            first, its = ({name: "sparse" for name in x.get("sparse", [])} for x in (said[0], other))
            lines.append(f"rank {rank} has other sparse gradients than rank 0: {_other_parameters(first, its)}")
        elif other.get("rate") != said[0].get("rate"):
            rates = f"rank {rank} has learning rate {other.get('rate')}, rank 0 has {said[0].get('rate')}"
            lines.append(f"{rates}, and {other['spec']!r} uses it: give all ranks one rate")
        elif other.get("buckets") == said[0].get("buckets") and other.get("digests") != said[0].get("digests"):
            lines.append(f"rank {rank} is at another place of the policy's schedule; load the state of the same step on all ranks")
        elif other.get("revoked") != said[0].get("revoked"):
            lines.append(f"rank {rank} has called discard() or undo() {other.get('revoked')} times, rank 0 {said[0].get('revoked')} times")
        elif other.get("step") != said[0].get("step"):
            steps = f"rank {rank} is at step {other.get('step')}, rank 0 at step {said[0].get('step')}"
            lines.append(f"{steps}; load the state of the same step on all ranks")
        elif {**other, **OWN} != {**said[0], **OWN}:
            lines.append(f"rank {rank} packs the parameters into other buckets than rank 0")
    return "ranks compress differently; make every rank run the same script:\n  " + "\n  ".join(lines)


def _other_parameters(first: Mapping[str, Any], its: Mapping[str, Any]) -> str:
    """Says in words how a rank's parameters, by name, differ from those of rank 0."""
    differing = [name for name in {**first, **its} if first.get(name) != its.get(name)]
    if not differing:
        return "the order of the parameters"
    if list(first.values()) == list(its.values()):
        return (
            f"{few(differing)}. Only the names differ: if one rank has built more Keras models than another, call "
            "keras.utils.clear_session() on all ranks before you build the model, or give the layers names"
        )
    both = [name for name in differing if name in first and name in its]
    changed = [f"{name} is {_kind(its[name])}, on rank 0 {_kind(first[name])}" for name in both[:3]]
    return few(differing) + "".join(f"; {text}" for text in changed)


def _kind(parameter: Any) -> str:
    """Returns a parameter's shape and dtype in words."""
    return f"{parameter[1]} {parameter[0]}" if isinstance(parameter, list) and len(parameter) == 2 else str(parameter)


def _different_values(found: Values, fix: str) -> str:
    """Says which ranks' parameters differ from those of most ranks (if as many differ as agree, from those of the group with rank 0)."""
    kinds = Counter(json.dumps(digests, sort_keys=True) for digests in found if digests is not None)
    usual = json.loads(kinds.most_common(1)[0][0])
    lines = []
    for rank, digests in enumerate(found):
        if digests is None:
            continue
        other = [name for name in {**usual, **digests} if usual.get(name) != digests.get(name)]
        if other:
            lines.append(f"rank {rank}: {len(other)} of {len(usual)} parameters differ: {few(other)}")
    same = ", ".join(str(rank) for rank, digests in enumerate(found) if digests == usual)
    lines = [f"rank {same}: taken as right", *lines]
    return f"the ranks' parameters are not the same bits. {fix}.\n  " + "\n  ".join(lines)


def check_nodes(said: Descriptions) -> None:
    """Raises GraceError if a state in two levels was saved by ranks that shared nodes in another way. All ranks of a node hold one memory,
    of the node's gradients; ranks that share nodes in another way have no such memory."""
    moves: Sequence[tuple[str, str]] = [(other["saved_on"], other["node"]) for other in said if other["saved_on"]]
    then, now = ({move[i] for move in moves} for i in (0, 1))
    if not len(set(moves)) == len(then) == len(now):
        raise GraceError(
            f"these states were saved by ranks that shared {len(then)} nodes otherwise than they share {len(now)} now, and each holds "
            "its node's memory: start the ranks as they were, or use grace_ext.save and grace_ext.load(..., resize='mean')"
        )
