"""The contracts that parts and transports keep, as tests for pytest: `TestMine = contract("mine", "mine(knob=2)")`.

`contract` is for compressors; `memory_contract`, `communicator_contract`, `policy_contract` and `transport_contract` are for the other
kinds. `check_transport` runs in the processes of a real job. They need pytest, hypothesis and ml_dtypes
(`pip install 'grace_ext[testing]'`). docs/extending.md shows how to use each.
"""

from __future__ import annotations

import importlib
from typing import Any

#: Where each name is defined. A module is imported when it is asked for, because the suites load every installed tensor library.
PLACES = {
    "contract": "compressors",
    "memory_contract": "memories",
    "communicator_contract": "communicators",
    "policy_contract": "policies",
    "transport_contract": "transports",
    "check_transport": "transport_checks",
}
__all__ = list(PLACES)


def __getattr__(name: str) -> Any:
    if name in PLACES:
        return getattr(importlib.import_module(f"{__name__}.{PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
