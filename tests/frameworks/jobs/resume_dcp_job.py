"""Resumes with torch.distributed.checkpoint: the wrapper, the DDP hook and LocalSGD. See resume_steps.py.

KIND is checkpoint-<api>:<spec>.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

sys.path.insert(0, str(Path(__file__).parent))
import resume_steps as steps  # noqa: E402
import resume_torch_job  # noqa: E402

import grace_ext.frameworks.torch as hvd  # noqa: E402


class Job(resume_torch_job.Job):
    without_unused = ("ddp", "wrapper")  # before the first step DCP expects momenta of all parameters

    def __init__(self, kind: str):
        super().__init__(kind.removeprefix("checkpoint-"))

    def states(self, ranks: int | None) -> dict:
        if isinstance(self.holder, hvd.LocalOptimizer):  # DistributedState has its optimizer, too
            return {"model": self.model.state_dict(), "grace_ext": self.distributed(ranks)}
        model, optimizer = get_state_dict(self.forward, self.optimizer)
        return {"model": model, "optimizer": optimizer, "grace_ext": self.distributed(ranks)}

    def distributed(self, ranks: int | None) -> hvd.DistributedState:
        return hvd.DistributedState(self.holder, ranks=ranks)

    def save(self, path: Path) -> None:
        dcp.save(self.states(None), checkpoint_id=path.with_suffix(".dcp"))
        path.write_text(str(hvd.size()))

    def load(self, path: Path) -> None:
        states = self.states(int(path.read_text()))
        dcp.load(states, checkpoint_id=path.with_suffix(".dcp"))
        if "optimizer" not in states:
            return
        set_state_dict(self.forward, self.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])


hvd.init()
steps.run(Job, hvd.rank(), hvd.size())
hvd.shutdown()
