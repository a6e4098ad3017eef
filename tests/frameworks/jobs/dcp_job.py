"""Cases of `DistributedState`, of optimizers in torch.distributed.checkpoint, and of compiled models' names, on 3 ranks under torchrun."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402
from cases import heard, raises, run_cases  # noqa: E402

import grace_ext  # noqa: E402
import grace_ext.frameworks.torch as hvd  # noqa: E402
from grace_ext.errors import CheckpointError, GraceError, ParameterError, UnsupportedError  # noqa: E402

TOPK = "topk(ratio=0.05) + residual"
#: Every kind of state (own, shared, shards, a mean, shifts, by node), and policies that choose by size, step and what they learn.
SPECS = (
    TOPK,
    "none",
    "powersgd(rank=2) + residual",
    "efsignsgd(block=16) + residual @ reduce_scatter",
    "topk(ratio=0.1) + ef21",
    "topk(ratio=0.1) + ef_star",
    "sidco(ratio=0.05, every=1) + residual",
    "topk(ratio=0.05) + residual @ hierarchical",
    "by_size(min_elements=20, small=none, large=topk(ratio=0.1) + residual)",
    "warmup(steps=3, then=topk(ratio=0.1) + residual)",
    "warmup(steps=30, then=topk(ratio=0.1) + residual)",
    "accordion",
    "lgreco",
)


@contextlib.contextmanager
def folder():
    """Yields a folder that all ranks see."""
    name = hvd.broadcast_object(tempfile.mkdtemp() if hvd.rank() == 0 else None, 0)
    yield Path(name)
    hvd.barrier()
    if hvd.rank() == 0:
        shutil.rmtree(name)


class Trained:
    """A model, and the object that keeps the memory of its compression."""

    def __init__(self, spec=TOPK, steps=0, momentum=0.0, compiled=False, **options):
        self.model = training.make_model()
        self.model.register_parameter("empty", torch.nn.Parameter(torch.ones(0, 3)))
        if compiled:
            self.model = torch.compile(self.model, backend="eager")
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=momentum)
        self.kept = self.optimizer = hvd.DistributedOptimizer(optimizer, self.model.named_parameters(), compression=spec, **options)
        self.train(0, steps)

    def train(self, start, stop):
        for step in range(start, stop):
            self.optimizer.zero_grad()
            training.loss_of(self.model, hvd.rank(), step).backward()
            self.optimizer.step()

    def memory(self):
        return self.kept.state_dict()["grace_ext"]


class InDDP(Trained):
    """wrapped: 'ddp', 'ddp(compiled)' or 'compiled(ddp)'."""

    def __init__(self, spec=TOPK, steps=0, wrapped="ddp"):
        model = training.make_model()
        del model._parameters["unused"]
        model = torch.compile(model, backend="eager") if wrapped == "ddp(compiled)" else model
        ddp = DistributedDataParallel(model)
        self.model = torch.compile(ddp, backend="eager") if wrapped == "compiled(ddp)" else ddp
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.kept, hook = hvd.ddp_comm_hook(spec, self.model, self.optimizer)
        ddp.register_comm_hook(self.kept, hook)
        self.train(0, steps)

    def memory(self):
        return self.kept.state_dict()


def assert_same(one, other):
    """Asserts that two memories are the same bits, and of the same step."""
    assert {**one, "state": 0} == {**other, "state": 0}, (one, other)
    assert set(one["state"]) == set(other["state"])
    for key, array in one["state"].items():
        assert torch.equal(array, other["state"][key]), key


def save(path, **states):
    dcp.save(states, checkpoint_id=path)


def load(path, **states):
    dcp.load(states, checkpoint_id=path)


def case_every_rank_gets_its_own_state():
    for made in (Trained, InDDP):
        for spec in SPECS:
            first, second = made(spec, steps=5), made(spec)
            expected = first.memory()
            with folder() as there:
                save(there, grace_ext=hvd.DistributedState(first.kept))
                load(there, grace_ext=hvd.DistributedState(second.kept))  # before its first step
                assert_same(second.memory(), expected)
                first.train(5, 7)
                load(there, grace_ext=hvd.DistributedState(first.kept))  # after other steps
                assert_same(first.memory(), expected)
            second.train(5, 7)  # what was loaded fits the parameters
    residuals = hvd.allgather_object([array.tolist() for array in Trained(steps=5).memory()["state"].values()])
    assert residuals[0] != residuals[1] != residuals[2]  # else the test could not see a mixture


def case_before_the_first_step():
    fresh, trained = Trained(), Trained(steps=5)
    with folder() as there:
        save(there, grace_ext=hvd.DistributedState(fresh.kept))
        load(there, grace_ext=hvd.DistributedState(trained.kept))
    assert_same(trained.memory(), fresh.memory())
    assert trained.memory()["step"] == 0
    trained.train(0, 2)


def case_training_continues_while_it_is_written():
    first, second = Trained(steps=5), Trained()
    expected = first.memory()
    with folder() as there:
        writing = dcp.async_save({"grace_ext": hvd.DistributedState(first.kept)}, checkpoint_id=there, process_group=GLOO)
        first.train(5, 9)
        writing.result()
        load(there, grace_ext=hvd.DistributedState(second.kept))
    assert_same(second.memory(), expected)


def case_some_of_the_ranks():
    two, one = SETS
    for chosen, spec in ((two, "powersgd(rank=2) + residual"), (one, TOPK)):
        first = Trained(spec, steps=5, process_set=chosen, simulate=True)
        with folder() as there:
            save(there, grace_ext=hvd.DistributedState(first.kept))
            second = Trained(spec, process_set=chosen, simulate=True)
            load(there, grace_ext=hvd.DistributedState(second.kept))
        if chosen.included():
            assert_same(second.memory(), first.memory())
        else:
            assert "grace_ext" not in second.optimizer.state_dict()


def case_two_optimizers_in_one_checkpoint():
    first, second = (Trained(steps=3), InDDP(steps=4)), (Trained(), InDDP())
    with folder() as there:
        save(there, **{f"of {i}": hvd.DistributedState(one.kept) for i, one in enumerate(first)})
        load(there, **{f"of {i}": hvd.DistributedState(one.kept) for i, one in enumerate(second)})
    for one, other in zip(first, second, strict=True):
        assert_same(one.memory(), other.memory())


def case_inside_of_the_users_own_stateful_object():
    class App:
        def __init__(self, trained):
            self.trained, self.memory = trained, hvd.DistributedState(trained.kept)

        def state_dict(self):
            model, optimizer = get_state_dict(self.trained.model, self.trained.optimizer)
            return {"model": model, "optimizer": optimizer, "memory": self.memory.state_dict()}

        def load_state_dict(self, states):
            set_state_dict(
                self.trained.model, self.trained.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
            )
            self.memory.load_state_dict(states["memory"])

    first, second = Trained(steps=5), Trained()
    with folder() as there, heard() as said:
        save(there, app=App(first))
        load(there, app=App(second))
    assert said == []
    assert_same(second.memory(), first.memory())
    first.train(5, 8)
    second.train(5, 8)
    assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True))


def case_what_does_not_fit_changes_nothing():
    first = Trained(steps=5)
    with folder() as there:
        save(there, grace_ext=hvd.DistributedState(first.kept))
        other_spec, own = Trained("efsignsgd + residual", steps=2), Trained(steps=2)
        before = other_spec.memory(), own.memory()
        memory = hvd.DistributedState(other_spec.kept)
        raises(CheckpointError, "efsignsgd", lambda: load(there, grace_ext=memory))
        memory = hvd.DistributedState(own.kept, ranks=4)
        raises(CheckpointException, "pass that number to DistributedState as ranks=", lambda: load(there, grace_ext=memory))
        larger = torch.nn.Sequential(torch.nn.Linear(3, 3))
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(larger.parameters(), lr=0.1), larger.named_parameters(), compression=TOPK)
        larger(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        raises(CheckpointError, "0.weight", lambda: load(there, grace_ext=hvd.DistributedState(optimizer)))
    assert_same(other_spec.memory(), before[0])
    assert_same(own.memory(), before[1])
    raises(CheckpointError, "pass the DistributedState itself to dcp.load", lambda: hvd.DistributedState(own.kept).load_state_dict({}))


def case_wrong_arguments():
    trained = Trained()
    for ranks in (0, -1, 2.0, True, "4"):
        raises(ParameterError, "ranks must be the number of ranks", lambda ranks=ranks: hvd.DistributedState(trained.kept, ranks=ranks))
    for wrong in (trained.model, torch.optim.SGD(trained.model.parameters(), lr=0.1)):
        raises(GraceError, "keeps no memory of compression", lambda wrong=wrong: hvd.DistributedState(wrong))


def case_the_state_of_another_number_of_ranks_cannot_be_saved():
    trained = Trained(steps=2)
    with folder() as there:
        memory = hvd.DistributedState(trained.kept, ranks=2)
        raises(CheckpointException, "to save, make one without ranks=", lambda: save(there, grace_ext=memory))
        save(there, grace_ext=hvd.DistributedState(trained.kept, ranks=3))


def case_a_plain_optimizer_is_saved_without_memory_and_rank_0_warns():
    first = Trained(steps=5, momentum=0.9)
    expected = first.memory()
    with folder() as there, heard() as said:
        save(there, optimizer=first.optimizer)
        names = dcp.FileSystemReader(there).read_metadata().state_dict_metadata
        assert names and not any("grace_ext" in name for name in names)
        load(there, optimizer=first.optimizer)
        get_optimizer_state_dict(first.model, first.optimizer)
    assert_same(first.memory(), expected)
    assert len(said) == (hvd.rank() == 0), said
    assert all(f"{__file__}:" in sentence and "hvd.DistributedState(optimizer)" in sentence for sentence in said), said
    second = Trained(steps=1)
    memory = hvd.DistributedState(second.kept)
    with folder() as there, heard() as said:
        save(there, optimizer=second.optimizer, grace_ext=memory)
    assert said == []


def case_what_would_be_lost_is_refused():
    hook, trained = InDDP(steps=2), Trained()
    optimizer = local(trained.model)
    with folder() as there:
        raises(UnsupportedError, f"{__file__}:", lambda: save(there, hook=hook.kept))
        raises(UnsupportedError, "pass hvd.DistributedState(state) instead", lambda: load(there, hook=hook.kept))
        raises(UnsupportedError, "instead of the optimizer", lambda: save(there, optimizer=optimizer))
        raises(UnsupportedError, "instead of the optimizer", lambda: get_state_dict(trained.model, optimizer))
    assert optimizer.state_dict()["grace_ext"]["model"]["step"] == 0
    assert hook.kept.state_dict()["step"] == 2


def case_a_state_that_the_script_takes_itself_is_refused():
    """DCP would mix the ranks' memories; a file of one rank keeps its own."""
    trained, hook = Trained(steps=2), InDDP(steps=2)
    for state in (trained.optimizer.state_dict(), hook.kept.state_dict(), local(Trained().model).state_dict()):
        with folder() as there:
            save(there, anything={"of": torch.ones(2)})
            for call in (save, load):
                with pytest.raises((UnsupportedError, CheckpointException), match=r"leave it out, and pass memory = hvd.Distrib") as raised:
                    call(there, anything={"deep": state})
                assert f"{__file__}:" in str(raised.value), raised.value
        for copied in (io_copy(state), copy.deepcopy(state), dict(state)):
            assert list(copied) == list(state)
    file = io.BytesIO()
    torch.save(trained.optimizer.state_dict(), file)
    file.seek(0)
    trained.train(2, 4)
    again = Trained()
    again.model.load_state_dict(trained.model.state_dict())
    again.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert again.memory()["step"] == 2 and type(torch.load(io.BytesIO(file.getvalue()))["grace_ext"]).__name__ == "OrderedDict"


def local(model, momentum=0.0, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    return hvd.LocalSGD(optimizer, model.named_parameters(), compression=TOPK, **{"every": 2, **options})


def case_local_sgd_resumes_with_every_rank_s_own_model_and_momenta():
    """Saved between two synchronizations, when the ranks' models differ; the model of the checkpoint is one rank's."""

    class InLocalSGD(Trained):
        def __init__(self, steps=0):
            self.model = training.make_model()
            self.kept = self.optimizer = local(self.model, momentum=0.9, every=4, outer_lr=0.7, outer_momentum=0.9)
            self.train(0, steps)

        def weights(self):
            return [p.detach().clone() for p in self.model.parameters()]

    whole, first, second = InLocalSGD(steps=11), InLocalSGD(steps=6), InLocalSGD()
    with folder() as there:
        save(there, model=first.model.state_dict(), grace_ext=hvd.DistributedState(first.kept))
        load(there, model=second.model.state_dict(), grace_ext=hvd.DistributedState(second.kept))
        assert all(map(torch.equal, first.weights(), second.weights()))
        other = hvd.allgather_object([p.tolist() for p in second.weights()])
        assert other[0] != other[1] != other[2]  # else the test could not see a mixture
        second.train(6, 11)
        assert all(map(torch.equal, whole.weights(), second.weights()))


def case_get_and_set_state_dict_exchange_nothing():
    """torch fills the state of an optimizer that has none by a step with zero gradients and learning rate 0. If that step exchanged, the
    residuals that it sent would be lost."""
    for options in ({}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}):
        for steps in (0, 5):
            trained = Trained(steps=steps)  # SGD without momentum has no state
            hvd.DistributedState(trained.kept)
            trained.optimizer.zero_grad()
            before = trained.memory()
            model, optimizer = get_state_dict(trained.model, trained.optimizer, options=StateDictOptions(**options))
            if not options:
                set_state_dict(trained.model, trained.optimizer, model_state_dict=model, optim_state_dict=optimizer)
            assert_same(trained.memory(), before)
    scaled = Trained(scaler=torch.amp.GradScaler("cpu"))
    get_optimizer_state_dict(scaled.model, scaled.optimizer)


def case_names_are_those_of_the_model_that_was_not_compiled():
    for plain, compiled in (
        (Trained, lambda **options: Trained(compiled=True, **options)),
        (InDDP, lambda **options: InDDP(wrapped="ddp(compiled)", **options)),
        (InDDP, lambda **options: InDDP(wrapped="compiled(ddp)", **options)),
    ):
        for first, second in ((plain(steps=3), compiled()), (compiled(steps=3), plain())):
            expected = first.memory()
            assert not any("_orig_mod" in key or "module." in key for key in expected["state"]), list(expected["state"])
            second.kept.load_state_dict(io_copy(first.kept.state_dict()))
            assert_same(second.memory(), expected)
            second.train(3, 5)
            with folder() as there:
                grace_ext.save(first.kept, there)
                assert grace_ext.load(second.kept, there) == 3
                assert_same(second.memory(), expected)
                save(there / "dcp", grace_ext=hvd.DistributedState(first.kept))
                second.train(3, 5)
                load(there / "dcp", grace_ext=hvd.DistributedState(second.kept))
                assert_same(second.memory(), expected)


def io_copy(state):
    """Returns what is read from a file with this state."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


os.environ["GRACE_EXT_NODE"] = str(int(os.environ["RANK"]) // 2)  # nodes of 2 ranks and of 1
hvd.init()
SETS = [hvd.add_process_set([0, 2]), hvd.add_process_set([1])]
GLOO = torch.distributed.new_group(backend="gloo")  # the thread that writes must not share the group of training
run_cases(hvd, globals())
hvd.shutdown()
