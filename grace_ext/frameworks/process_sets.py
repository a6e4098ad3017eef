"""Horovod's process sets for the groups of an exchange in two levels; the same for torch's Horovod and TensorFlow's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UnsupportedError

_known: dict[tuple[int, ...], Any] = {}


def process_set_of(hvd: Any, ranks: Sequence[int], size: int) -> Any:
    """Horovod's set of these ranks: that of all, one made before, or a new one. All ranks call it alike. size: of what is divided."""
    if size != hvd.size():
        raise UnsupportedError("'hierarchical' works among all ranks of the job; leave process_set out")
    key = tuple(ranks)
    if len(key) == size:
        return hvd.global_process_set
    known = _known.get(key)
    if known is None or known.process_set_id is None:  # None: Horovod was shut down since
        try:
            _known[key] = hvd.add_process_set(list(key))
        except (RuntimeError, ValueError) as error:
            raise UnsupportedError(
                f"'hierarchical' needs a process set of ranks {list(key)}, and Horovod made none ({error}): set "
                "HOROVOD_DYNAMIC_PROCESS_SETS=1 on every rank, and let no process set of your own have the same ranks"
            ) from error
    return _known[key]
