"""Checks that the transport which this launcher's engine has keeps its contract.  transport_job.py {torch|tensorflow|mpi}

Prints 'CASE case_name ok' for each check that holds on all ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from grace_ext.exchange.transport import Transport
from grace_ext.frameworks import launched
from grace_ext.testing.transport_checks import CHECKS

BY = {"torch": launched._torch, "tensorflow": launched._tensorflow, "mpi": launched._mpi}


@contextmanager
def transport() -> Iterator[Transport]:
    yield from BY[sys.argv[1]]()


with transport() as here:
    for check in CHECKS:
        check(here)
        if here.rank == 0:
            print(f"CASE case_{check.__name__} ok", flush=True)
