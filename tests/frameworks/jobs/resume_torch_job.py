"""Resumes with torch: the wrapper, bind with unmodified Horovod, the DDP hook, LocalSGD. See resume_steps.py; KIND is <api>:<spec>."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import resume_steps as steps  # noqa: E402

import grace_ext  # noqa: E402
import grace_ext.frameworks.torch as hvd  # noqa: E402
from tests.frameworks.support import training  # noqa: E402


class Job:
    #: The APIs whose model has no parameter without a gradient.
    without_unused: tuple[str, ...] = ("ddp",)

    def __init__(self, kind: str):
        api, name = kind.split(":")
        g = grace_ext.grace(steps.SPECS[name])
        self.api, self.knows_parameters, self.bf16 = api, api != "local", name == "bf16"
        self.model = self.forward = training.make_model()
        if self.bf16:
            self.model.to(torch.bfloat16)
        if api in self.without_unused:
            del self.model._parameters["unused"]
        if api == "ddp":
            self.forward = torch.nn.parallel.DistributedDataParallel(self.model)
        self.plain = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.optimizer = self.plain
        if api == "wrapper":
            self.optimizer = self.holder = hvd.DistributedOptimizer(self.plain, self.model.named_parameters(), compression=g)
        elif api == "local":
            self.optimizer = self.holder = hvd.LocalSGD(self.plain, self.model.named_parameters(), compression=g, every=5)
        elif api == "bind":
            import horovod.torch as plain_hvd

            self.holder = g.bind(self.model.named_parameters(), optimizer=self.plain)
            # Horovod's optimizer has its own state; ours shares the state of the optimizer that it wraps.
            self.plain = self.optimizer = plain_hvd.DistributedOptimizer(
                self.plain, self.model.named_parameters(), compression=self.holder
            )
        else:
            self.holder, hook = hvd.ddp_comm_hook(g, self.forward, self.plain)
            self.forward.register_comm_hook(self.holder, hook)

    def step(self, i: int) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):  # it converts the data
            loss = training.loss_of(self.forward, hvd.rank(), i)
        loss.backward()
        self.optimizer.step()

    def arrays(self):
        return {name: p.detach().float().numpy() for name, p in self.model.named_parameters()}

    def memory(self):
        return self.optimizer.state_dict()["grace_ext"] if self.api in ("wrapper", "local") else self.holder.state_dict()

    def take(self, state):
        if self.api in ("wrapper", "local"):
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "grace_ext": state})
        else:
            self.holder.load_state_dict(state)

    def save(self, path: Path) -> None:
        torch.save({"model": self.model.state_dict(), "optimizer": self.plain.state_dict()}, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.plain.load_state_dict(saved["optimizer"])
        if self.optimizer is not self.plain:
            self.optimizer.param_groups, self.optimizer.state = self.plain.param_groups, self.plain.state


if __name__ == "__main__":
    hvd.init()
    steps.run(Job, hvd.rank(), hvd.size())
    hvd.shutdown()
