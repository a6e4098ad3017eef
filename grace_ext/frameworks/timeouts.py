"""How long a rank waits for the others: GRACE_EXT_TIMEOUT, in seconds; by default half an hour, as in torch.distributed."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from ..errors import ParameterError, shown

NAME, DEFAULT = "GRACE_EXT_TIMEOUT", 1800.0
#: The most seconds by which grace_ext itself ends a wait later than GRACE_EXT_TIMEOUT.
MARGIN = 10.0


def timeout(environ: MutableMapping[str, str] = os.environ) -> float:
    """Returns the seconds. Raises ParameterError if the variable is not a number above 0 and below 1e9."""
    said = environ.get(NAME, "")
    try:
        seconds = float(said or DEFAULT)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise ParameterError(f"{NAME} must be a number of seconds above 0: how long a rank waits for the others; got {shown(said)}")
    return seconds


def patience(environ: MutableMapping[str, str] = os.environ) -> float:
    """Returns the seconds after which grace_ext itself ends a wait that its engine has not ended: a little more than the timeout, because
    the engine's own errors say more."""
    seconds = timeout(environ)
    return seconds + min(MARGIN, max(1.0, seconds / 4))
