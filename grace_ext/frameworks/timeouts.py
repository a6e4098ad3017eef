"""How long a rank waits for the others: GRACE_EXT_TIMEOUT, in seconds; by default half an hour, as in torch.distributed."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from ..errors import ParameterError

NAME, DEFAULT = "GRACE_EXT_TIMEOUT", 1800.0


def timeout(environ: MutableMapping[str, str] = os.environ) -> float:
    """Returns the seconds. Raises ParameterError if the variable is not a number above 0 and below 1e9."""
    said = environ.get(NAME, "")
    try:
        seconds = float(said or DEFAULT)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise ParameterError(f"{NAME} must be a number of seconds above 0: how long a rank waits for the others; got {said!r}")
    return seconds
