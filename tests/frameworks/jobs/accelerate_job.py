"""Cases of `compress` for Accelerate on 2 ranks under torchrun, and `alone` on one rank."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader

import grace_ext.frameworks.torch as hvd
from grace_ext.errors import IncompatiblePartsError, ParameterError, UnsupportedError
from grace_ext.integrations.accelerate import compress

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import assert_same, heard, raises, run_cases  # noqa: E402
from trainers import SPECS, Fed, Points, in_cluster, on_rank_0, sgd, shared_folder, weights_of  # noqa: E402

TOPK, POWERSGD = SPECS


class Training:
    """A script that trains with Accelerate, and can stop and go on."""

    def __init__(self, g=TOPK, passes=1, scaler=None, optimizer=sgd, model=None):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=passes)
        self.accelerator.scaler = scaler  # as mixed_precision='fp16' makes one on a GPU
        model = model or Fed()
        prepared = self.accelerator.prepare(model, optimizer(model), DataLoader(Points(), batch_size=8))
        self.model, self.optimizer, self.loader = prepared
        self.state = compress(self.accelerator, g, self.model, self.optimizer)
        self.sent, self.fed = [], iter(self.loader)

    def steps(self, count):
        for _ in range(count):
            while True:
                batch = next(self.fed)
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(**batch)["loss"])
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.sent.append(self.state.wire_bytes)
                    break
        return self

    @property
    def bare(self):
        return self.accelerator.unwrap_model(self.model)


def case_equals_local_cluster():
    """Also with accumulation, and with the scaler of mixed_precision='fp16', whose scale is a power of two."""
    for g, passes, scaler in ((TOPK, 1, None), (POWERSGD, 2, None), (TOPK, 1, torch.amp.GradScaler("cpu", init_scale=2.0**10))):
        training = Training(g, passes, scaler).steps(6)
        weights, expected = in_cluster(g, training.bare.batches, sgd, passes)
        assert_same(weights_of(training.bare), weights)
        assert training.sent == expected, (training.sent, expected)


def case_resume():
    """`save_state` and `load_state` keep every rank's memory, in one file each."""
    for g in (TOPK, POWERSGD):
        folder = shared_folder()
        training = Training(g).steps(3)
        training.accelerator.save_state(folder)
        assert len(list((folder / "grace_ext").glob("rank-*"))) == 2
        expected = weights_of(training.steps(3).bare)
        resumed = Training(g)
        resumed.accelerator.load_state(folder)
        for _ in range(3):
            next(resumed.fed)
        assert_same(weights_of(resumed.steps(3).bare), expected)
        on_rank_0(lambda: shutil.rmtree(folder / "grace_ext"))  # noqa: B023
        with heard() as said:
            resumed.accelerator.load_state(folder)
        assert len(said) == (hvd.rank() == 0) and all("starts at zero" in line for line in said), said
        on_rank_0(lambda: shutil.rmtree(folder))  # noqa: B023


def case_two_models():
    folder = shared_folder()
    training = Training().steps(2)
    other = training.accelerator.prepare(Fed())
    second = compress(training.accelerator, POWERSGD, other)
    other(**next(training.fed))["loss"].backward()
    training.accelerator.save_state(folder)
    assert (folder / "grace_ext").exists() and (folder / "grace_ext-1").exists()
    training.accelerator.load_state(folder)
    assert training.state.state_dict()["step"] == 2 and second.state_dict()["step"] == 1
    on_rank_0(lambda: shutil.rmtree(folder))


def case_refuses():
    raises(IncompatiblePartsError, "applied twice", lambda: Training("topk(ratio=0.1) + dgc"))  # it sees the SGD behind Accelerate's
    accelerator = Accelerator(cpu=True)
    raises(ParameterError, "with the model that prepare returned", lambda: compress(accelerator, TOPK, Fed()))
    prepared = accelerator.prepare(Fed())
    compress(accelerator, TOPK, prepared)
    raises(UnsupportedError, "one hook only", lambda: compress(accelerator, TOPK, prepared))


def case_accelerate_ignores_a_hook_that_is_a_function():
    """docs/trainers.md says so."""
    handler = DistributedDataParallelKwargs(comm_hook=lambda state, bucket: None)
    assert not Accelerator(cpu=True, kwargs_handlers=[handler]).prepare(Fed())._comm_hooks


def case_sharded_models_are_refused():
    """Accelerate shards on accelerators only, so here the kind of the job is set by hand."""
    accelerator = Accelerator(cpu=True)
    kind = accelerator.distributed_type
    try:
        accelerator.state.distributed_type = DistributedType.FSDP
        raises(UnsupportedError, "leave FSDP out", lambda: compress(accelerator, TOPK, Fed()))
    finally:
        accelerator.state.distributed_type = kind


def alone():
    """One process has no DDP: nothing is compressed, and what would act alone is refused."""
    with heard() as said:
        assert Training().steps(2).sent == [0, 0]
    assert ["one process" in line for line in said] == [True], said
    raises(UnsupportedError, "with torchrun", lambda: Training("signsgd"))
    print("ALONE ok")


hvd.init()
run_cases(hvd, dict(globals()))
hvd.shutdown()
