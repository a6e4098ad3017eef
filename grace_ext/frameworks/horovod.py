"""Horovod support that the torch and TensorFlow wrappers share: process sets, limits of waits, and the `compression=` argument."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from functools import cache
from typing import Any

from ..composition.grace import Grace
from ..composition.making import grace, is_spec
from ..errors import CollectiveError, ParameterError, UnsupportedError, shown
from .timeouts import NAME, timeout

_known: dict[tuple[int, ...], Any] = {}


@cache
def failure_of(kind: type[Exception]) -> type[CollectiveError]:
    """Returns a CollectiveError class that is also the engine's own error, which elastic jobs and Horovod's users catch."""
    return type("CollectiveError", (CollectiveError, kind), {"__module__": CollectiveError.__module__})


def process_set_of(hvd: Any, ranks: Sequence[int], size: int) -> Any:
    """Returns Horovod's process set of these ranks: the global one, one made before, or a new one. All ranks must call it alike.
    size: the number of ranks of the transport whose groups these are; it must be the whole job. Raises UnsupportedError."""
    if size != hvd.size():
        raise UnsupportedError("'hierarchical' works among all ranks of the job; leave process_set out")
    key = tuple(ranks)
    if len(key) == size:
        return hvd.global_process_set
    known = _known.get(key)
    if known is None or known.process_set_id is None:  # None: Horovod was shut down in the meantime
        try:
            _known[key] = hvd.add_process_set(list(key))
        except (RuntimeError, ValueError) as error:
            raise UnsupportedError(
                f"'hierarchical' needs a process set of ranks {list(key)}, and Horovod did not make it ({error}): set "
                "HOROVOD_DYNAMIC_PROCESS_SETS=1 on every rank, and do not give a process set of your own the same ranks"
            ) from error
    return _known[key]


def limit_waits(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets the time limits that Horovod reads in init(), unless the user has set them: for a rank that does not start a collective (by
    default the others wait for ever), and, if GRACE_EXT_TIMEOUT is set, for a rank that does not answer (30 s by default)."""
    seconds = max(1, round(timeout(environ)))
    if "HOROVOD_STALL_CHECK_DISABLE" not in environ and "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS" not in environ:
        environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = str(seconds)
        # Horovod accepts no limit below the time after which it warns.
        environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(min(60, max(1, seconds // 2))))
    if environ.get(NAME):
        environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(seconds)


def chosen_compression(compression: Any, theirs: Any) -> Grace:
    """Returns the Grace that a wrapper's `compression=` stands for. It is what `grace_ext.grace` takes, None, or one of Horovod's own
    compressions (`theirs`: hvd.Compression). Raises ParameterError for anything else."""
    if compression is None or compression is theirs.none:
        return grace("none")
    if compression is theirs.fp16:
        return grace("fp16")
    if is_spec(compression):
        return grace(compression)
    raise ParameterError(
        "compression must be None, hvd.Compression.none or .fp16, or what grace_ext.grace(...) takes or returns, such as "
        f"'topk(ratio=0.01) + residual', got {shown(compression)}"
    )
