"""Defines all errors, and how users are warned. Each error says what was seen, which rule it breaks and what to do, and keeps its data as
attributes."""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import NamedTuple

#: Where launchers say which rank a process is. torchrun's own comes first: srun may have started the torchrun.
RANKS = ("RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
#: Packages whose lines a warning does not point at.
INSIDE = {"grace_ext", "torch", "tensorflow", "keras", "horovod", "lightning", "pytorch_lightning", "accelerate", "transformers"}


class GraceError(Exception):
    """Every error that grace_ext raises on purpose inherits from this class."""


class UnknownPartError(GraceError, KeyError):
    """No part has that name. `kind` is compressor, memory, communicator or policy; `nearest` are similar known names."""

    def __init__(self, kind: str, name: str, nearest: Sequence[str], known: Sequence[str]):
        self.kind, self.name, self.nearest, self.known = kind, name, tuple(nearest), tuple(known)
        meant = f"; did you mean {' or '.join(repr(n) for n in nearest)}?" if nearest else ";"
        super().__init__(f"no {kind} named {shown(name)}{meant} Known: {', '.join(known)}")

    def __str__(self) -> str:  # KeyError would quote the whole message
        return str(self.args[0])


class ParameterError(GraceError, ValueError):
    """A knob's value is out of range or of the wrong type, or the part has no such knob."""


class SpecSyntaxError(GraceError, ValueError):
    """A spec string or configuration cannot be read."""


class IncompatiblePartsError(GraceError, ValueError):
    """The parts cannot work together; raised when they are composed."""


class UnsupportedError(GraceError, NotImplementedError):
    """The request is not supported in this setting; the message says why and what to do instead."""


class UnboundError(GraceError, TypeError):
    """A Grace was used without being bound to a model's parameters, which is needed here."""


class NamesError(GraceError, ValueError):
    """Parameter names are duplicated, missing, or not those of the earlier steps."""


class TensorChangedError(GraceError, ValueError):
    """A tensor's shape or dtype is not the one that its name had at the first step."""


class UnsupportedDtypeError(GraceError, TypeError):
    """A gradient is integer, boolean or complex."""


class LearningRateError(GraceError, RuntimeError):
    """A part uses the learning rate, but no optimizer that has one was bound."""


class DisagreementError(GraceError, RuntimeError):
    """The ranks' scripts compress differently. `by_rank` holds what each rank reported."""

    def __init__(self, message: str, by_rank: Sequence[dict]):
        self.by_rank = tuple(by_rank)
        super().__init__(message)


class CheckpointError(GraceError, RuntimeError):
    """A checkpoint could not be written, does not exist, is damaged, or belongs to another exchange."""


class RankLeftError(GraceError, RuntimeError):
    """Other ranks have left, have not come in time, or are at another step. `ranks` lists them."""

    def __init__(self, message: str, ranks: Sequence[int] = ()):
        self.ranks = tuple(ranks)
        super().__init__(message)


class CollectiveError(GraceError, RuntimeError):
    """The engine could not finish a collective: a peer died, the network failed, or a rank did not come in time. `name` is the collective's
    name, `parameters` are those whose gradients it carried, `rank` is the rank that reports it (an engine seldom knows who caused it)."""

    def __init__(self, reason: str, name: str, parameters: Sequence[str], rank: int):
        self.reason, self.name, self.parameters, self.rank = reason, name, tuple(parameters), rank
        shown = ", ".join(self.parameters[:3]) + (f" and {len(self.parameters) - 3} more" if len(self.parameters) > 3 else "")
        super().__init__(
            f"rank {rank}: collective {name!r}{f' of {shown}' if shown else ''} failed: {reason}. Look in the other ranks' output for the "
            "one that ended or stopped first (or that steps several optimizers in another order); the memory is that of the last complete "
            "step. Training can continue from a checkpoint, or by itself as an elastic job; if a peer is only slow, set a longer "
            "GRACE_EXT_TIMEOUT (docs/faults.md)"
        )


class Sender(NamedTuple):
    """Says who sent a payload, and for which parameter. explain: raises a PayloadError that says more, if there is one."""

    rank: int
    parameter: str
    explain: Callable[[], object] | None = None

    def blamed(self, error: PayloadError) -> PayloadError:
        """Returns the error with what is known of the payload."""
        try:
            if self.explain is not None:
                self.explain()
        except PayloadError as better:
            return better
        return error.at(self.rank, self.parameter)


#: Of the payload that is being decoded: for requirements that are looked at later (Ops.require).
sender: ContextVar[Sender | None] = ContextVar("sender", default=None)


class PayloadError(GraceError, RuntimeError):
    """A payload from another rank cannot be decoded. `rank` sent it; `parameter` is the tensor, if it is known."""

    def __init__(self, reason: str, rank: int | None = None, parameter: str | None = None):
        self.reason, self.rank, self.parameter = reason, rank, parameter
        where = f"payload of rank {rank}" if rank is not None else "payload"
        what = f" for {parameter!r}" if parameter else ""
        super().__init__(f"{where}{what}: {reason}")

    def at(self, rank: int, parameter: str | None) -> PayloadError:
        """Returns the same error with the sender and the parameter filled in."""
        return PayloadError(self.reason, rank, parameter)


class ModelError(GraceError, ValueError):
    """A model's shapes cannot be found: its file or module does not exist, cannot be read, or holds something else."""


class UnstableFeedbackWarning(UserWarning):
    """Error feedback is used with a random compressor whose variance exceeds its input, so the residual can grow without bound."""


class BiasedCompressorWarning(UserWarning):
    """A biased compressor is used without a memory."""


class DoubtfulSettingWarning(UserWarning):
    """A compressor's knobs are valid, but are known to train badly or to cost more than they save (`Compressor.caution`)."""


def warn_user(
    message: str, category: type[Warning] = UserWarning, *, every_rank: bool = False, environ: Mapping[str, str] = os.environ
) -> None:
    """Warns at the user's own line that led here, on rank 0 only (the others would say the same), or on every rank."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    if every_rank or next((environ[name] for name in RANKS if name in environ), "0") == "0":
        warnings.warn(message, category, stacklevel=level)
        return
    with warnings.catch_warnings(record=True):  # not shown, but if the user made warnings errors, all ranks must raise alike
        warnings.warn(message, category, stacklevel=level)


class Afterwards:
    """Calls these actions at the end of a with block, all of them in any case. An error of the block arrives as it is, with a note
    of each action that failed; without one, the first error of an action arrives."""

    def __init__(self, *actions: Callable[[], object]):
        self._actions = actions

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, raised: BaseException | None, trace: object) -> None:
        # These two end a block, but are not what went wrong: a note of theirs would not be seen.
        error = None if isinstance(raised, (GeneratorExit, SystemExit)) else raised
        failed: Exception | None = None
        for action in self._actions:
            try:
                action()
            except Exception as problem:
                if (first := error or failed) is None:
                    failed = problem
                else:
                    # As add_note does, which Python 3.10 lacks.
                    notes = [*getattr(first, "__notes__", ()), f"while cleaning up: {type(problem).__name__}: {problem}"]
                    first.__notes__ = notes  # type: ignore[union-attr]
        if failed is not None:
            raise failed


def few(names: Iterable[str]) -> str:
    """Returns the first five names as text, with ', ...' if there are more."""
    shown = list(itertools.islice(names, 6))
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")


def shown(value: object, most: int = 200) -> str:
    """Returns the value as an error repeats it: its repr, cut if it is long. Never raises."""
    try:
        text = repr(value)
    except Exception:  # a number of more digits than Python prints, or an object of the caller's
        text = f"a value of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= most else text[: most - 3] + "..."


#: The reason in a PayloadError for a payload that holds NaN or Inf without saying so.
NOT_FLAGGED = "decodes to NaN or Inf, although its header says that all values are finite"
