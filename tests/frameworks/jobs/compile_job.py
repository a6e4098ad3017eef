"""Cases of torch.compile around and inside DDP, in every mode of torch._dynamo.config.optimize_ddp, on 2 ranks under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import grace_ext.frameworks.torch as hvd
from grace_ext.errors import UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import assert_same, raises, run_cases  # noqa: E402
from trainers import SPECS, Fed, Points, in_cluster, weights_of  # noqa: E402

#: Two names are older ones: True is 'ddp_optimizer', False is 'no_optimization'.
MODES = (True, "ddp_optimizer", False, "no_optimization", "python_reducer_without_compiled_forward")
BATCHES = [{name: torch.stack([Points()[8 * (2 * step + rank) + i][name] for i in range(8)]) for name in ("x", "labels")}
           for rank in range(2) for step in range(4)]  # fmt: skip


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def mine():
    return [(batch["x"], batch["labels"]) for batch in BATCHES[4 * hvd.rank() : 4 * hvd.rank() + 4]]


def train(model, optimizer):
    for x, labels in mine():
        optimizer.zero_grad()
        model(x, labels)["loss"].backward()
        optimizer.step()


def quiet():
    """A model that keeps no batches, which a compiler would have to trace."""
    return Fed().eval()


def trained(mode, spec, **options):
    """Trains compile(DDP(model)) in this mode, and returns the weights and the state."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=mode):
        ddp = DistributedDataParallel(quiet(), **options)
        compiled = torch.compile(ddp, backend="aot_eager")
        state = hvd.compress_ddp(spec, compiled, optimizer := sgd(ddp))
        train(compiled, optimizer)
    return weights_of(ddp.module), state


def case_a_compiled_ddp_in_every_mode():
    for spec, modes in ((SPECS[0], MODES), (SPECS[1], MODES[:1])):
        weights, sent = in_cluster(spec, mine(), sgd)
        for mode in modes:
            got, state = trained(mode, spec)
            assert_same(got, weights)
            assert state.wire_bytes == sent[-1], mode


def case_a_compiled_ddp_with_several_buckets():
    """'ddp_optimizer' cuts the graph at their borders. It takes no later bucket that is smaller than the first, of 1 MiB."""
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000):
        got, state = trained("ddp_optimizer", SPECS[0], bucket_cap_mb=0.002)
    assert_same(got, in_cluster(SPECS[0], mine(), sgd)[0])
    assert len(state._made.driver.buckets) > 1


def case_a_ddp_of_a_compiled_model():
    """The names of the parameters, and so PowerSGD's first Q and the keys of a state, are those of the plain model."""
    for spec in SPECS:
        torch._dynamo.reset()
        weights, sent = in_cluster(spec, mine(), sgd)
        model = quiet()
        ddp = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
        state = hvd.compress_ddp(spec, ddp, optimizer := sgd(ddp))
        train(ddp, optimizer)
        for name, weight in weights_of(model).items():
            np.testing.assert_allclose(weight, weights[name], rtol=0, atol=2e-6)  # a compiler may order additions otherwise
        assert state.wire_bytes == sent[-1]
        assert not [key for key in state.state_dict()["state"] if "_orig_mod" in key]


def case_the_python_reducer_is_refused():
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        ddp = DistributedDataParallel(quiet())
        raises(UnsupportedError, "use 'ddp_optimizer'", lambda: hvd.compress_ddp(SPECS[0], torch.compile(ddp)))


hvd.init()
run_cases(hvd, dict(globals()))
hvd.shutdown()
