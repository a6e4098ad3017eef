"""Cases of 'auto' in real jobs: all ranks choose the same spec, the fastest on this network, and log it once.  auto_job.py

A slow network is simulated: every wait for a collective is prolonged by the time of its bytes at a given rate.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.frameworks.torch import engine
from grace_ext.frameworks.torch.devices import ops_for

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import heard, run_cases  # noqa: E402

SPECS = ["topk(ratio=0.01) + residual", "efsignsgd + residual"]
RATE = [0.0]  # bytes per second; 0: not slowed


def slowed(kind):
    waits = kind.wait

    def wait(self, handle):
        collective = handle[0]
        if RATE[0]:
            time.sleep(collective.nbytes / RATE[0])
        return waits(self, handle)

    kind.wait = wait


def trained(rate):
    """Trains. Returns (index of the leaf that all ranks use at the end, bytes of each step, log lines)."""
    RATE[0] = rate
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10))
    g = grace_ext.grace(f"auto(steps=2, candidates={SPECS})")
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), compression=g)
    sent = []
    with heard() as said:
        for step in range(5):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + hvd.rank())
            model(torch.randn(8, 300, generator=generator)).square().mean().backward()
            optimizer.step()
            sent.append(optimizer.wire_bytes)
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for other in hvd.allgather(weights[None]):
        assert torch.equal(other, weights)
    (choice,) = {int(state["policy:choice"][0]) for state in optimizer._exchange.session.driver.state.values()}
    assert np.ptp([int(x) for x in hvd.allgather(torch.tensor([choice]))]) == 0
    return choice, sent, said


def case_slow():
    """On a slow network (240 KB take 0.1 s dense) a compressor is chosen."""
    choice, sent, said = trained(2e6)
    assert choice in (1, 2) and sent[0] > 240_000 and sent[-1] < sent[0] / 25, (choice, sent)
    told = [text for text in said if text.startswith("auto: ")]
    assert len(told) == (hvd.rank() == 0) and all("gains" in text or "against" in text for text in told), said


def case_dense_where_it_is_best():
    """On this machine, compressing 240 KB gains nothing: dense is chosen, unless another spec was measured to be faster by a tenth."""
    choice, sent, said = trained(0.0)
    if choice == 0:
        assert sent[-1] == sent[0]
        assert hvd.rank() or "dense is best here" in said[-1]
    else:
        assert hvd.rank() or "a step takes" in said[-1]


hvd.init()
torch.set_num_threads(1)
slowed(type(engine.transport(ops_for(torch.device("cpu")), hvd.global_process_set)))
run_cases(hvd, globals())
hvd.shutdown()
