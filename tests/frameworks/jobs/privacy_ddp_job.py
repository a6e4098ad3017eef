"""Cases of privacy in DDP's hook, under torchrun. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import copy
import math

import torch
import torch.distributed as dist
from ddp_setup import EACH_ALONE, TOPK, Layers, layers_loss, raises, run_cases, training
from privacy import check_nothing_raw_is_sent, same_noise, tapped
from torch.nn.parallel import DistributedDataParallel

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.errors import ParameterError, UnsupportedError

CLIP = 1e-3
NOISELESS = hvd.Privacy(clip=CLIP, noise_multiplier=0)


def hooked(model, g="none", privacy=NOISELESS, bucket_cap_mb=EACH_ALONE, **options):
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb, **options)
    return ddp, hvd.compress_ddp(g, ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), privacy=privacy)


def case_it_equals_a_local_cluster_bit_for_bit():
    """With many buckets, which DDP rebuilds after the first step, and with one; the whole gradient is clipped, not each bucket."""
    for cap in (EACH_ALONE, 25):
        ddp, _ = hooked(Layers(), TOPK, bucket_cap_mb=cap)
        cluster = grace_ext.LocalCluster(TOPK, hvd.size(), "torch", privacy=NOISELESS)
        for step in range(4):
            raw = []
            for rank in range(hvd.size()):
                twin = copy.deepcopy(ddp.module)
                twin.zero_grad()
                layers_loss(twin, rank, step).backward()
                raw.append({name: p.grad for name, p in twin.named_parameters()})
            ddp.zero_grad()
            layers_loss(ddp, hvd.rank(), step).backward()
            for name, mean in cluster.step(raw).items():
                assert mean.numpy().tobytes() == dict(ddp.module.named_parameters())[name].grad.numpy().tobytes(), name


def case_layers_that_no_rank_uses_get_noise():
    """Which layers a rank has used is not to be seen."""
    ddp, state = hooked(Layers(), privacy=hvd.Privacy(clip=1, noise_multiplier=1), find_unused_parameters=True)
    for step in range(3):
        ddp.zero_grad()
        layers_loss(ddp, hvd.rank(), step, uses=[0, 1]).backward()
        for p in ddp.module.parameters():
            assert 0.5 < float(p.grad.std()) * math.sqrt(hvd.size()) < 1.5
    assert math.isclose(state.epsilon(1e-5), hvd.Privacy().epsilon(1e-5, 3))


def case_accumulated_passes_are_one_release():
    ddp, state = hooked(Layers(), privacy=hvd.Privacy(clip=1, noise_multiplier=1))
    with ddp.no_sync():
        layers_loss(ddp, hvd.rank(), 0).backward()
    layers_loss(ddp, hvd.rank(), 1).backward()
    assert state._session().driver.mechanism.releases == 1


def case_the_transport_sees_private_gradients_only():
    seen = {}
    with same_noise(hvd.rank()):
        for private in (True, False):
            for scale in (1.0, 1024.0):
                ddp, state = hooked(Layers(), TOPK, hvd.Privacy(clip=CLIP) if private else None)
                seen[private, scale] = tapped(state._session().driver.transport)
                for step in range(3):
                    ddp.zero_grad()
                    (scale * layers_loss(ddp, hvd.rank(), step)).backward()
    check_nothing_raw_is_sent(seen)


def case_what_is_refused():
    plain = Layers()
    ddp = DistributedDataParallel(plain)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    raises(UnsupportedError, "scaler= cannot be used", lambda: hvd.ddp_comm_hook("none", ddp, optimizer, scaler=scaler, privacy=NOISELESS))
    by_example = "gaussian(unit='example', batch=8) | none"
    raises(UnsupportedError, "ddp_comm_hook gets one gradient per rank", lambda: hvd.ddp_comm_hook(by_example, ddp, optimizer))
    raises(ParameterError, "privacy must be Privacy", lambda: hvd.ddp_comm_hook("none", ddp, optimizer, privacy=1.0))
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    normalized, _ = hooked(model)
    raises(UnsupportedError, "batch normalization", lambda: normalized(torch.ones(2, 3)).sum().backward())


dist.init_process_group("gloo")
hvd.init()
torch.manual_seed(0)
training.make_model()
run_cases(hvd, globals())
