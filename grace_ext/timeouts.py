"""How long a rank waits for the others: GRACE_EXT_TIMEOUT, in seconds; by default half an hour, as torch.distributed."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from .errors import ParameterError

NAME, DEFAULT = "GRACE_EXT_TIMEOUT", 1800.0


def timeout(environ: MutableMapping[str, str] = os.environ) -> float:
    """Seconds. Raises ParameterError for what is no positive number."""
    said = environ.get(NAME, "")
    try:
        seconds = float(said or DEFAULT)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise ParameterError(f"{NAME} is how many seconds a rank waits for the others, above 0, got {said!r}")
    return seconds


def tell_horovod(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets Horovod's own limits, which it reads in init(), where the user has not: for a rank that does not come to a collective (by
    default it is waited for for ever), and, with GRACE_EXT_TIMEOUT, for one that does not answer (30 s by default)."""
    seconds = max(1, round(timeout(environ)))
    if "HOROVOD_STALL_CHECK_DISABLE" not in environ and "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS" not in environ:
        environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = str(seconds)
        # Horovod takes no limit below its warning's.
        environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(min(60, max(1, seconds // 2))))
    if environ.get(NAME):
        environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(seconds)
