"""Runs an example, and ends its process in the middle of the second epoch:  interrupted.py EXAMPLE.py OPTIONS..."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_pre_hook

LAST = 80  # steps; an epoch has 62, or with its last batch, which is smaller, 63
made = []


def count(*_: object) -> None:
    made.append(None)
    if len(made) > LAST:
        os._exit(1)


register_optimizer_step_pre_hook(count)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
