"""How long a rank waits for the others: GRACE_EXT_TIMEOUT, in seconds; by default half an hour, as torch.distributed."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from ..errors import ParameterError

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
