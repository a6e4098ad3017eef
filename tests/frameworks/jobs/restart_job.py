"""Trains 12 steps under torchrun with a checkpoint after every 4th, and prints 'WEIGHTS digest restarts' at the end.

Arguments: FOLDER SPEC [die]. With `die`, rank 1 of the first start kills itself in the 7th step, after its backward pass. torchrun then
starts all ranks again (--max-restarts), and they continue from the last checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

import grace_ext
import grace_ext.frameworks.torch as hvd

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402

FOLDER, SPEC, DIES = Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["die"]
RESTARTS = int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def save(step):
    """Saves the model on rank 0 and the memory on all ranks; then writes the step to `last`, which makes this the last checkpoint."""
    folder = FOLDER / f"step-{step}"
    folder.mkdir(exist_ok=True)
    if hvd.rank() == 0:
        own = {key: value for key, value in optimizer.state_dict().items() if key != "grace_ext"}
        torch.save({"model": model.state_dict(), "optimizer": own}, folder / "model.pt")
    grace_ext.save(optimizer, folder)
    if hvd.rank() == 0:
        (FOLDER / "last.new").write_text(str(step))
        (FOLDER / "last.new").rename(FOLDER / "last")


def load():
    """Loads the last checkpoint, if any. Returns the step to continue from."""
    if not (FOLDER / "last").exists():
        return 0
    step = int((FOLDER / "last").read_text())
    saved = torch.load(FOLDER / f"step-{step}" / "model.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    grace_ext.load(optimizer, FOLDER / f"step-{step}")
    return step


hvd.init()
model = training.make_model()
inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), compression=grace_ext.grace(SPEC))
for step in range(load(), 12):
    optimizer.zero_grad()
    training.loss_of(model, hvd.rank(), step).backward()
    if DIES and RESTARTS == 0 and step == 6 and hvd.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()
    if step % 4 == 3:
        save(step + 1)
hvd.check_agreement(optimizer)
if hvd.rank() == 0:
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    print("WEIGHTS", grace_ext.driver.agreement.digest_of(flat.numpy()), RESTARTS, flush=True)
hvd.shutdown()
