"""What can go wrong. Every error says what was seen, which rule it breaks and what to do, and keeps its data as attributes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence


class GraceError(Exception):
    """Base of every error that grace_ext raises on purpose."""


class UnknownPartError(GraceError, KeyError):
    """No part of that name. `kind` is compressor, memory, communicator or policy; `nearest` are similar known names."""

    def __init__(self, kind: str, name: str, nearest: Sequence[str], known: Sequence[str]):
        self.kind, self.name, self.nearest, self.known = kind, name, tuple(nearest), tuple(known)
        meant = f"; did you mean {' or '.join(repr(n) for n in nearest)}?" if nearest else ";"
        super().__init__(f"no {kind} named {name!r}{meant} Known: {', '.join(known)}")

    def __str__(self) -> str:  # KeyError would quote the whole message
        return str(self.args[0])


class ParameterError(GraceError, ValueError):
    """A knob of a part has a value out of its range or of the wrong type, or there is no such knob."""


class SpecSyntaxError(GraceError, ValueError):
    """A spec string or configuration that cannot be read."""


class IncompatiblePartsError(GraceError, ValueError):
    """A mix of parts that cannot work, refused when it is composed."""


class UnsupportedError(GraceError, NotImplementedError):
    """Something that is refused in this setting; the message says why and what to do instead."""


class UnboundError(GraceError, TypeError):
    """A Grace was used where only one bound to a model's parameters works."""


class NamesError(GraceError, ValueError):
    """Parameter names that are duplicated, missing, or not those of the earlier steps."""


class TensorChangedError(GraceError, ValueError):
    """A tensor whose shape or dtype is not what it was under its name at the first step."""


class UnsupportedDtypeError(GraceError, TypeError):
    """Integer, boolean or complex gradients."""


class LearningRateError(GraceError, RuntimeError):
    """A part uses the learning rate, and no optimizer was bound that has one."""


class DisagreementError(GraceError, RuntimeError):
    """Ranks whose scripts compress differently. `by_rank` holds what each rank said."""

    def __init__(self, message: str, by_rank: Sequence[dict]):
        self.by_rank = tuple(by_rank)
        super().__init__(message)


class CheckpointError(GraceError, RuntimeError):
    """A checkpoint that could not be written, is not there, is damaged, or is of another exchange."""


class RankLeftError(GraceError, RuntimeError):
    """Ranks that are waited for have left, have not come in time, or are at another step. `ranks` are those."""

    def __init__(self, message: str, ranks: Sequence[int] = ()):
        self.ranks = tuple(ranks)
        super().__init__(message)


class CollectiveError(GraceError, RuntimeError):
    """The engine could not end a collective: a peer died, the network failed, or somebody did not come in time. `name` is the collective's,
    `parameters` those whose gradients it carried, `rank` the rank that says so (an engine seldom knows whose fault it was)."""

    def __init__(self, reason: str, name: str, parameters: Sequence[str], rank: int):
        self.reason, self.name, self.parameters, self.rank = reason, name, tuple(parameters), rank
        shown = ", ".join(self.parameters[:3]) + (f" and {len(self.parameters) - 3} more" if len(self.parameters) > 3 else "")
        super().__init__(
            f"rank {rank}: collective {name!r}{f' of {shown}' if shown else ''} failed: {reason}. Look at the other ranks' output for the "
            "one that ended or stopped first; the memory is that of the last whole step. Training can go on from a checkpoint, or "
            "by itself as an elastic job; a peer that is only slow may need a longer GRACE_EXT_TIMEOUT (docs/faults.md)"
        )


class PayloadError(GraceError, RuntimeError):
    """What arrived from a peer cannot be decoded. `rank` sent it; `parameter` is the tensor, where it is known."""

    def __init__(self, reason: str, rank: int | None = None, parameter: str | None = None):
        self.reason, self.rank, self.parameter = reason, rank, parameter
        where = f"payload of rank {rank}" if rank is not None else "payload"
        what = f" for {parameter!r}" if parameter else ""
        super().__init__(f"{where}{what}: {reason}")

    def at(self, rank: int, parameter: str | None) -> PayloadError:
        """The same error, with the sender and the parameter filled in."""
        return PayloadError(self.reason, rank, parameter)


class ModelError(GraceError, ValueError):
    """A model whose shapes cannot be had: a file or module that is not there, cannot be read, or holds something else."""


class UnstableFeedbackWarning(UserWarning):
    """Error feedback of a random compressor whose variance exceeds what it is given: what is remembered can grow without bound."""


class BiasedCompressorWarning(UserWarning):
    """A biased compressor is used without a memory."""


def few(names: Iterable[str]) -> str:
    """The first five of them."""
    shown = list(itertools.islice(names, 6))
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")


#: What a PayloadError says of a payload that hides NaN or Inf.
NOT_FLAGGED = "decodes to NaN or Inf, although its header says that all values are finite"
