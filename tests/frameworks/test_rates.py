"""Memories that use the learning rate get the current one from every frontend; memories that are the momentum reject an optimizer with its
own momentum. Tested on one rank with simulate=True; other tests compare jobs of several ranks with LocalCluster."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from .support.launch import environment


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


TORCH = '''
import warnings; warnings.simplefilter("ignore")
import numpy as np, torch, grace_ext
from grace_ext.errors import IncompatiblePartsError, LearningRateError
import grace_ext.frameworks.torch as hvd
hvd.init()
SPEC = "topk(ratio=0.25) + efsignsgd"
targets = [torch.randn(40, generator=torch.Generator().manual_seed(i)) for i in range(6)]

def trained(wrap, spec=SPEC):
    """Trains six steps with a learning rate that a scheduler changes; `wrap` adds the exchange."""
    w = torch.nn.Parameter(torch.zeros(40))
    optimizer = torch.optim.SGD([w], lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer = wrap(w, optimizer) or optimizer
    for target in targets:
        optimizer.zero_grad()
        (w - target).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return w.detach().numpy()

def by_hand(spec=SPEC):
    cluster, w, lr = grace_ext.LocalCluster(grace_ext.grace(spec), 1, framework="torch"), torch.zeros(40), 0.5
    for target in targets:
        w = w - lr * cluster.step([{"w": 2 * (w - target)}], lr=lr)["w"]
        lr *= 0.5
    return w.numpy()

def wrapper(w, optimizer):
    return hvd.DistributedOptimizer(optimizer, [("w", w)], compression=grace_ext.grace(SPEC), simulate=True)

assert np.abs(trained(wrapper) - by_hand()).max() < 1e-6
print("WRAPPER OK")
'''
MOMENTUM = '''
def refused(make, text):
    try: make()
    except IncompatiblePartsError as error: assert text in str(error), error
    else: raise AssertionError("not refused")

for memory in ("dgc", "update_compression", "gradient_compression", "ef21_sgdm", "dist_ef_block(momentum=0.9)"):
    g = grace_ext.grace(("randblock" if memory[0] == "u" else "topk") + " + " + memory)
    for make, text in (
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum=0.9"), (lambda p: torch.optim.Adam(p), "betas"),
        (lambda p: torch.optim.RMSprop(p), "eps"), (lambda p: torch.optim.Rprop(p), "etas"),
    ):
        w = torch.nn.Parameter(torch.zeros(4))
        for entrance in ENTRANCES:
            refused(lambda: entrance(g, w, make([w])), text)
    w = torch.nn.Parameter(torch.zeros(4))
    for entrance in ENTRANCES:
        entrance(g, w, torch.optim.SGD([w], lr=0.1))
w = torch.nn.Parameter(torch.zeros(4))
for entrance in ENTRANCES:
    entrance(grace_ext.grace("topk + residual"), w, torch.optim.Adam([w]))
print("MOMENTUM OK")
'''


def test_torch_wrapper():
    entrance = "ENTRANCES = [lambda g, w, o: hvd.DistributedOptimizer(o, [('w', w)], compression=g, simulate=True)]\n"
    out = python(TORCH + entrance + MOMENTUM)
    assert "WRAPPER OK" in out and "MOMENTUM OK" in out


@pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod is not installed")
def test_torch_bind():
    code = '''
import os
os.environ.update(HOROVOD_CONTROLLER="gloo", HOROVOD_CPU_OPERATIONS="gloo")  # plain python: no MPI was started
import horovod.torch as plain
plain.init()

def bound(w, optimizer):
    compression = grace_ext.grace(SPEC).bind([("w", w)], optimizer=optimizer, simulate=True)
    return plain.DistributedOptimizer(optimizer, [("w", w)], compression=compression)

assert np.abs(trained(bound) - by_hand()).max() < 1e-6
print("BIND OK")
ENTRANCES = [lambda g, w, o: g.bind([("w", w)], optimizer=o)]
'''
    out = python(TORCH + code + MOMENTUM)
    assert "BIND OK" in out and "MOMENTUM OK" in out


def test_ddp():
    code = '''
import os, torch.distributed as dist
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.is_initialized() or dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

class Holder(torch.nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, target):
        return (self.w - target).square().sum()

def train(with_optimizer):
    w = torch.nn.Parameter(torch.zeros(40))
    ddp = torch.nn.parallel.DistributedDataParallel(Holder(w))
    optimizer = torch.optim.SGD([w], lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    ddp.register_comm_hook(*hvd.ddp_comm_hook(SPEC, ddp, optimizer if with_optimizer else None, simulate=True))
    for target in targets:
        optimizer.zero_grad()
        ddp(target).backward()
        optimizer.step()
        scheduler.step()
    return w.detach().numpy()

assert np.abs(train(True) - by_hand()).max() < 1e-6
try: train(False)
except Exception as error: assert "uses the learning rate" in str(error) and "ddp_comm_hook(..., optimizer=optimizer)" in str(error), error
else: raise AssertionError("no error")
print("DDP OK")
ENTRANCES = [lambda g, w, o: hvd.ddp_comm_hook(g, Holder(w), o)]
'''
    out = python(TORCH + code + MOMENTUM)
    assert "DDP OK" in out and "MOMENTUM OK" in out


def test_mpi_exchange():
    pytest.importorskip("mpi4py")
    code = '''
import numpy as np, grace_ext, grace_ext.frameworks.numpy as gnp
from grace_ext.errors import LearningRateError
g = grace_ext.grace("topk(ratio=0.25) + efsignsgd")
cluster = grace_ext.LocalCluster(g, 1)
with gnp.Exchange(g, simulate=True) as exchange:
    try: exchange.step({"w": np.ones(40, np.float32)})
    except LearningRateError as error: assert "lr=" in str(error)
    else: raise AssertionError("no error")
    for step in range(4):
        x = {"w": np.random.default_rng(step).standard_normal(40).astype(np.float32)}
        assert exchange.step(x, lr=0.5**step)["w"].tobytes() == cluster.step([x], lr=0.5**step)["w"].tobytes()
print("MPI OK")
'''
    assert "MPI OK" in python(code)


KERAS = '''
import warnings; warnings.simplefilter("ignore")
import keras, numpy as np, tensorflow as tf, grace_ext, grace_ext.frameworks.tensorflow as hvd
from grace_ext.errors import IncompatiblePartsError, LearningRateError
hvd.init()
targets = [np.random.default_rng(i).standard_normal(40).astype(np.float32) for i in range(6)]
SPEC = "efsignsgd(block=8) + dist_ef_block @ reduce_scatter(follow_rate=True)"

for graph in (False, True):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    w = keras.Variable(np.zeros(40, np.float32), name="w")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(schedule), compression=grace_ext.grace(SPEC), simulate=True)
    optimizer.build([w])
    apply = lambda g: optimizer.apply([g], [w])
    apply = tf.function(apply) if graph else apply
    cluster, other, lr = grace_ext.LocalCluster(grace_ext.grace(SPEC), 1), np.zeros(40, np.float32), 0.5
    for target in targets:
        apply(tf.constant(2 * (w.numpy() - target)))
        other = other - np.float32(lr) * cluster.step([{"w": 2 * (other - target)}], lr=lr)["w"]
        lr *= 0.5
    assert np.abs(w.numpy() - other).max() < 1e-5, (graph, w.numpy(), other)
print("SCHEDULE OK")

v = tf.Variable(np.zeros(4, np.float32))
with tf.GradientTape() as tape:
    tape = hvd.DistributedGradientTape(tape, compression=grace_ext.grace("topk + efsignsgd"), simulate=True)
    loss = tf.reduce_sum(v)
try: tape.gradient(loss, [v])
except LearningRateError as error: assert "DistributedOptimizer" in str(error)
else: raise AssertionError("no error")
print("TAPE OK")

for memory in ("dgc", "update_compression", "gradient_compression", "ef21_sgdm"):
    g = grace_ext.grace(f"topk + {memory}")
    for optimizer, text in (
        (keras.optimizers.SGD(0.1, momentum=0.9), "momentum=0.9"), (keras.optimizers.Adam(), "beta_1"), (keras.optimizers.RMSprop(), "rho"),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "beta_1"), (keras.optimizers.Adafactor(), "beta_2_decay"),
    ):
        try: hvd.DistributedOptimizer(optimizer, compression=g, simulate=True)
        except IncompatiblePartsError as error: assert text in str(error), error
        else: raise AssertionError((memory, text))
    hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=g, simulate=True)
print("MOMENTUM OK")
'''


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed")
def test_keras():
    out = python(KERAS)
    assert all(f"{what} OK" in out for what in ("SCHEDULE", "TAPE", "MOMENTUM"))
