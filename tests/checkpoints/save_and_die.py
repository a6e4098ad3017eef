"""Interrupts saves at different moments, each in a forked process, for test_checkpoint.py.

    python -m tests.checkpoints.save_and_die < CASES.json

CASES is a list of ["kill", n, folder], for SIGKILL before the n-th fsync, rename or removal, and ["limit", bytes, folder], for a limit on
the length of files. Prints a line of JSON per case: the signal that ended the process, and the text of the error.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import grace_ext
from grace_ext.checkpoints import checkpoint

from . import resume_matrix


def dying(function: Callable, calls: list[int], at: int) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def save(what: str, at: int, folder: str, cluster: grace_ext.LocalCluster) -> str:
    """Saves with this interruption. Returns the text of the error, or '' if there was none."""
    if what == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
    else:
        calls: list[int] = []
        for owner, name in ((checkpoint.os, "fsync"), (checkpoint.os, "replace"), (checkpoint.Path, "unlink")):
            setattr(owner, name, dying(getattr(owner, name), calls, at))
    try:
        grace_ext.save(cluster, folder)
    except grace_ext.GraceError as error:
        return str(error)
    return ""


def main() -> None:
    cluster = resume_matrix.cluster_of("topk(ratio=0.1) + residual")
    resume_matrix.train(cluster, 0, 5)
    for what, at, folder in json.load(sys.stdin):
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writes, save(what, at, folder, cluster).encode())
            os._exit(0)
        os.close(writes)
        status = os.waitpid(child, 0)[1]
        said = os.read(reads, 10000).decode()
        os.close(reads)
        print(json.dumps({"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "said": said}), flush=True)


if __name__ == "__main__":
    main()
