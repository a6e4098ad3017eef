"""A lighthouse of torchft, or one replica that trains under it.

    torchft_job.py lighthouse LEAST                               prints its port, and serves until it is killed
    torchft_job.py FOLDER NAME PORT sync|async LEAST SPEC [EVENT..]   trains until the folder has a file `stop` with the last step

A replica writes to FOLDER/NAME.txt 'GAVE step quorum size rank takes-part' after an exchange that has not failed, 'STEP step quorum size
rank takes-part digest time' if the step counts, and 'LOG ...', what grace_ext logs. LEAST: how many replicas are enough to go on.
EVENT: 'die:STEP', it kills itself in the backward pass of this step, when some buckets are exchanged; 'refuse:STEP', it does not count
this step, although the exchange has succeeded, the first time that it makes it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchft
from torchft.coordination import LighthouseServer

from grace_ext.frameworks.torch.session import digests_of
from grace_ext.integrations.torchft import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402

PATIENCE = timedelta(seconds=10)


def lighthouse(least: int) -> None:
    server = LighthouseServer(bind="0.0.0.0:0", min_replicas=least, join_timeout_ms=20000, heartbeat_timeout_ms=1500)
    print(server.address().rsplit(":", 1)[1], flush=True)
    signal.pause()


def replica(folder: Path, name: int, port: str, mode: str, least: int, spec: str, events: list[str]) -> None:
    log = (folder / f"{name}.txt").open("a", buffering=1)
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("LOG %(message)s"))
    logging.getLogger("grace_ext").addHandler(handler)
    net = training.make_model()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.01 * name)  # what a replica starts with must not matter: it gets the model of the first
    inner = training.make_optimizer(net)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = torchft.ProcessGroupGloo(timeout=PATIENCE)
    manager = torchft.Manager(
        pg=group,
        state_dict=lambda: {"net": net.state_dict(), "optimizer": inner.state_dict()},
        load_state_dict=lambda saved: (net.load_state_dict(saved["net"]), inner.load_state_dict(saved["optimizer"])),
        min_replica_size=least, use_async_quorum=mode == "async", timeout=PATIENCE, rank=0, world_size=1,
        store_addr="localhost", store_port=store.port, lighthouse_addr=f"http://localhost:{port}", replica_id=f"replica{name}",
    )  # fmt: skip
    model = DistributedDataParallel(manager, net, spec, inner, bucket_cap_mb=0.002)
    optimizer = torchft.Optimizer(manager, inner)

    def happens(event: str) -> bool:
        return f"{event}:{manager.current_step()}" in events

    net[0].weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL) if happens("die") else None)  # its gradient comes last
    while not ((stop := folder / "stop").exists() and manager.current_step() >= int(stop.read_text())):
        optimizer.zero_grad()
        training.loss_of(model, name, manager.current_step()).backward()
        step = manager.current_step()  # a replica that joins knows it only now
        about = step, manager._quorum_id, group.parent.size(), group.parent.rank(), int(manager.is_participating())
        if manager.errored() is None:
            print("GAVE", *about, file=log)
        if happens("refuse"):
            events.remove(f"refuse:{step}")
            manager.report_error(RuntimeError("this replica was told to refuse this step"))
        optimizer.step()
        if manager.current_step() > step:
            digest = "-".join(x.split(":")[1] for x in digests_of(net.state_dict()).values())
            print("STEP", *about, digest, time.time(), file=log)
        time.sleep(0.05)
    np.savez(folder / f"{name}.npz", **training.weights_of(net))
    manager.shutdown()


if sys.argv[1] == "lighthouse":
    lighthouse(int(sys.argv[2]))
else:
    folder, name, port, mode, least, spec, *events = sys.argv[1:]
    replica(Path(folder), int(name), port, mode, int(least), spec, events)
