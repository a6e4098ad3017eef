"""Cases of mixed precision with torch on 2 ranks, under any launcher. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.errors import UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.frameworks.support import training  # noqa: E402
from tests.frameworks.support.cases import assert_same, raises, run_cases  # noqa: E402

TOPK = "topk(ratio=0.05) + residual"
#: Memories with one array and with two, with shared momentum, shards, a norm of the whole model, and the learning rate.
MEMORIES = (
    TOPK, "topk(ratio=0.05) + dgc(clipping=1)", "topk(ratio=0.1) + ef21", "topk(ratio=0.1) + ef21_sgdm", "qsgd(bits=4) + diana",
    "topk(ratio=0.05) + gradient_compression", "topk(ratio=0.05) + update_compression", "topk(ratio=0.05) + efsignsgd",
    "efsignsgd(block=16) + dist_ef_block(momentum=0.5) @ reduce_scatter(follow_rate=True)", "powersgd(rank=2) + powersgd",
)  # fmt: skip


class Amp:
    """Trains one model with a scaler, by the wrapper or the DDP hook. scale=None: without a scaler."""

    def __init__(self, spec: str = TOPK, scale: float | None = 2.0**10, ddp: bool = False):
        g, self.model = grace_ext.grace(spec), training.make_model()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=2, enabled=scale is not None)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.ddp, self.forward = ddp, self.model
        if ddp:
            del self.model._parameters["unused"]
            self.forward = torch.nn.parallel.DistributedDataParallel(self.model)
            self.state, hook = hvd.ddp_comm_hook(g, self.forward, self.optimizer, scaler=self.scaler)
            self.forward.register_comm_hook(self.state, hook)
        else:
            self.optimizer = hvd.DistributedOptimizer(
                self.optimizer, self.model.named_parameters(), compression=g, scaler=None if scale is None else self.scaler
            )

    def step(self, i: int, factor: float = 1.0, autocast: torch.dtype | None = None) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = training.loss_of(self.forward, hvd.rank(), i) * factor
        self.scaler.scale(loss).backward()
        if self.ddp:
            self.scaler.step(self.optimizer)
        else:
            self.optimizer.synchronize()
            self.scaler.unscale_(self.optimizer)
            with self.optimizer.skip_synchronize():
                self.scaler.step(self.optimizer)
        self.scaler.update()

    def memory(self) -> dict[str, bytes]:
        saved = self.state.state_dict() if self.ddp else self.optimizer.state_dict()["grace_ext"]
        return {key: x.numpy().tobytes() for key, x in saved["state"].items()}

    def weights(self) -> dict[str, np.ndarray]:
        return training.weights_of(self.model)


def same_on_all_ranks(value) -> bool:
    return len({repr(other) for other in hvd.allgather_object(value)}) == 1


def forms() -> tuple[bool, ...]:
    """Returns the values of `ddp` to test: the wrapper, and with torch.distributed also the DDP hook."""
    return (False, True) if torch.distributed.is_initialized() else (False,)


def case_growing_scale_changes_no_bit():
    """While the scale grows from 2**10 to 2**15, weights and memory have the bits of training without a scaler."""
    for ddp in forms():
        for spec in (TOPK, "qsgd(bits=4) + residual", "powersgd(rank=2) + residual"):
            scaled, plain = Amp(spec, ddp=ddp), Amp(spec, None, ddp=ddp)
            for i in range(10):
                scaled.step(i)
                plain.step(i)
            assert scaled.scaler.get_scale() == 2.0**15
            assert_same(scaled.weights(), plain.weights())
            assert scaled.memory() == plain.memory(), spec


def case_one_ranks_inf_is_skipped_by_all():
    """After an Inf on one rank, no weights or memory change, every scaler halves its scale, and training goes on as without that step."""
    for ddp in forms():
        for spec in MEMORIES[:1] if ddp else MEMORIES:
            amp, plain = Amp(spec, ddp=ddp), Amp(spec, None, ddp=ddp)
            for i in (0, 1, 2):
                amp.step(i)
                plain.step(i)
            scale, memory, weights = amp.scaler.get_scale(), amp.memory(), amp.weights()
            amp.step(3, factor=float("inf") if hvd.rank() == 1 else 1.0)
            assert amp.memory() == memory and memory, spec
            assert_same(amp.weights(), weights)
            assert amp.scaler.get_scale() == scale / 2 and same_on_all_ranks(amp.scaler.get_scale())
            amp.step(4)
            assert any((amp.weights()[name] != weights[name]).any() for name in weights), spec
            assert same_on_all_ranks({name: w.tobytes() for name, w in amp.weights().items()})
            if spec == TOPK:  # topk draws nothing by the step number, so this equals training without the skipped step
                plain.step(4)
                assert_same(amp.weights(), plain.weights())


def case_not_finite_in_sparse_gradients():
    """An Inf or NaN in one rank's sparse gradient, in unique rows or in rows that are added up, skips the step on all ranks, at the first
    step too: no weights and no memory change."""
    for first in (True, False):
        for where in ("unique", "repeated", "overflow"):
            torch.manual_seed(0)
            table, dense = torch.nn.Embedding(6, 4, sparse=True), torch.nn.Linear(4, 3)
            model = torch.nn.Sequential(table, dense)
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=TOPK, scaler=scaler)

            def step(bad, where=where, model=model, optimizer=optimizer, scaler=scaler, table=table):
                optimizer.zero_grad()
                index = torch.tensor([0, 2, 2] if where != "unique" else [0, 2, 4])
                scaler.scale(model(index).square().sum() * (1 + hvd.rank())).backward()
                if bad:
                    values = table.weight.grad._values()
                    if where == "unique":
                        values[1, 1] = float("nan")
                    elif where == "repeated":
                        values[1, 0], values[2, 0] = float("inf"), float("-inf")
                    else:
                        values[1:, 0] = 3e38
                optimizer.synchronize()
                scaler.unscale_(optimizer)
                with optimizer.skip_synchronize():
                    scaler.step(optimizer)
                scaler.update()

            def seen(model=model, optimizer=optimizer):
                memory = optimizer.state_dict()["grace_ext"]["state"]
                return training.weights_of(model), {key: x.clone() for key, x in memory.items()}

            if not first:
                step(bad=False)
            (weights, memory), scale = seen(), scaler.get_scale()
            step(bad=hvd.rank() == 1)
            after, memory_after = seen()
            assert_same(after, weights)
            assert scaler.get_scale() == scale / 2 and same_on_all_ranks(scaler.get_scale()), (first, where)
            assert all(torch.equal(memory_after[key], value) for key, value in memory.items()), (first, where)
            if first:
                assert not any(value.any() for value in memory_after.values())
            step(bad=False)
            assert any((seen()[0][name] != weights[name]).any() for name in weights)
            assert same_on_all_ranks({name: w.tobytes() for name, w in seen()[0].items()})


def case_autocast():
    """With 16-bit autocast, with and without a scaler, all ranks have the same model, and the loss falls."""
    for dtype, scale in ((torch.float16, 2.0**10), (torch.bfloat16, None), (torch.bfloat16, 2.0**4)):
        for ddp in forms():
            amp, losses = Amp(scale=scale, ddp=ddp), []
            for i in range(30):
                amp.step(i % 2, autocast=dtype)
                losses.append(training.loss_of(amp.model, hvd.rank(), i % 2).item())
            assert np.mean(losses[-6:]) < np.mean(losses[:6]), (dtype, losses)
            assert same_on_all_ranks({name: w.tobytes() for name, w in amp.weights().items()})


def case_the_recipe_is_asked_for():
    amp = Amp()
    amp.scaler.scale(training.loss_of(amp.model, hvd.rank(), 0)).backward()
    before = amp.weights()
    raises(UnsupportedError, "optimizer.skip_synchronize()", amp.optimizer.step)
    assert_same(amp.weights(), before)
    amp.optimizer.synchronize()


def case_what_happens_without_scaler():
    """Without scaler=, weights are different, because the residual is in units of an earlier scale."""
    told, untold = Amp(), Amp()
    untold.optimizer._exchange.session._scaler = None
    for i in range(6):
        told.step(i)
        untold.step(i)
    assert any((told.weights()[name] != untold.weights()[name]).any() for name in told.weights())


if __name__ == "__main__":
    hvd.init()
    run_cases(hvd, globals())
    hvd.shutdown()
