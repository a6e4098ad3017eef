"""One rank of two in a job of mix_real.py: runs random cases by a real engine, and compares them with LocalCluster, bit for bit.

    mix_rank.py ENGINE FIRST_SEED LAST_SEED OUT

After each case rank 0 appends a line to OUT: the seed, and 'held', 'refused' (alike on both ranks) or what is wrong. A case that stops the
job leaves no line.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
import numpy as np

import grace_ext
from benchmarks.reliability.mix_case import Case, Tensor, gradients, named, quiet
from benchmarks.reliability.mix_draw import a_case
from grace_ext.composition.grace import Grace
from grace_ext.errors import GraceError, IncompatiblePartsError, LearningRateError, ParameterError, UnsupportedError
from grace_ext.testing.inputs import DTYPES

State = dict[str, np.ndarray]
SIZE = 2
#: Errors that say, before anything is exchanged, that this engine or wrapper does not take the spec.
REFUSALS = (UnsupportedError, IncompatiblePartsError, ParameterError, LearningRateError)


def case_of(seed: int, engine: str) -> Case | None:
    """Returns the seed's case for two ranks; None if its results depend on times."""
    case = a_case(seed, Counter())
    if engine != "local_sgd" and "auto(" in case.spec or case.long:
        return None
    tensors = [t if t.shape else replace(t, shape=(1,)) for t in case.tensors if np.prod(t.shape, dtype=int)]
    # A loss is one dtype in TensorFlow and DDP. Horovod itself takes no bfloat16, and products of TensorFlow have no subnormal numbers.
    dtypes = {"tensorflow": ("float32",), "ddp": ("float32",), "bind": ("float32", "float64", "float16")}.get(engine, tuple(DTYPES))
    small = ("tiny", "subnormal", "wide") if engine == "tensorflow" else ()
    tensors = [replace(t, kind="normal" if t.kind in small else t.kind) for t in tensors]
    tensors = [replace(t, dtype=t.dtype if t.dtype in dtypes else dtypes[0]) for t in tensors] or [Tensor("w", (17,))]
    if engine not in ("mpirun", "torchrun", "horovodrun"):  # names of their own; TensorFlow and plain Horovod do not take all
        tensors = [replace(t, name=f"p{i}:0" if engine == "tensorflow" else f"p{i}") for i, t in enumerate(tensors)]
    if engine == "ddp" and case.bad:
        tensors = tensors[:1]  # DDP makes buckets of its own, and values that are not finite concern their bucket alone
    per_node = 1 if engine == "local_sgd" else min(case.per_node, SIZE)  # LocalSGDCluster has no nodes
    if engine == "local_sgd" and ("auto(" in case.spec or seed % 2):  # it refuses a part of most policies, but few compositions
        case = replace(case, spec=str(grace_ext.grace(case.spec).leaves[-1]))
    shorter = {"size": SIZE, "per_node": per_node, "steps": min(case.steps, 3), "load_at": None, "path": ""}
    return replace(case, tensors=tuple(tensors), **shorter)


def expected(case: Case, g: Grace, framework: str) -> list[State]:
    """Returns the results of each step in a LocalCluster."""
    cluster, found = grace_ext.LocalCluster(g, SIZE, framework, case.per_node), []
    for step in range(case.steps):
        given: Any = gradients(case, step)
        if framework == "torch":
            given = [{name: tensor(array) for name, array in mapping.items()} for mapping in given]
        result = cluster.step(given, lr=case.rate(step))
        found.append({name: array(x) for name, x in result.items()})
    return found


def tensor(array: np.ndarray) -> Any:
    """Returns a torch tensor of the same dtype and values."""
    import torch

    wide = array.astype(np.float32) if array.dtype.itemsize == 2 else array
    return torch.from_numpy(wide.copy()).to(getattr(torch, array.dtype.name))


def array(tensor: Any) -> np.ndarray:
    """Returns a numpy array of the same dtype and values as a tensor of any library."""
    if type(tensor).__module__.startswith("torch"):
        wide = tensor.detach().float() if tensor.dtype.itemsize == 2 else tensor.detach()
        return wide.numpy().astype(DTYPES[str(tensor.dtype).removeprefix("torch.")])
    return np.array(tensor)


# --- engines: each yields this rank's results by step ------------------------------------------------------------------
def by_torch(case: Case, g: Grace, wrap: Callable[[Any, Any], Any], rank: int) -> Iterator[State]:
    """Runs a torch optimizer that `wrap` makes distributed, given an optimizer and named parameters. The loss is the product of parameters
    and gradients, so its gradients are these."""
    import torch

    named_parameters = [(t.name, torch.nn.Parameter(tensor(np.zeros(t.shape, DTYPES[t.dtype])))) for t in case.tensors]
    momentum = next((m.optimizer_momentum for m in g.memories if m.optimizer_momentum is not None), 0.0)
    optimizer = torch.optim.SGD([p for _, p in named_parameters], lr=case.rate(0), momentum=momentum)
    wrapped = wrap(optimizer, named_parameters)
    for step in range(case.steps):
        wrapped.zero_grad()
        for group in wrapped.param_groups:
            group["lr"] = case.rate(step)
        backward(named_parameters, gradients(case, step)[rank])
        wrapped.step()
        yield {name: array(p.grad) for name, p in named_parameters}


def backward(named_parameters: list[tuple[str, Any]], mine: State) -> None:
    sum((p * tensor(mine[name])).sum().double() for name, p in named_parameters).backward()


def by_ddp(case: Case, g: Grace, hvd: Any) -> Iterator[State]:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for t in case.tensors:
                self.register_parameter(t.name, torch.nn.Parameter(torch.zeros(t.shape)))

        def forward(self, mine: dict[str, Any]) -> Any:
            return sum((p * mine[name]).sum() for name, p in self.named_parameters())

    model = DistributedDataParallel(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=case.rate(0))
    state, hook = hvd.ddp_comm_hook(g, model, optimizer=optimizer)
    model.register_comm_hook(state, hook)
    for step in range(case.steps):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = case.rate(step)
        model({name: torch.from_numpy(a) for name, a in gradients(case, step)[hvd.rank()].items()}).backward()
        yield {name: array(p.grad) for name, p in model.module.named_parameters()}


def by_tensorflow(case: Case, g: Grace, hvd: Any) -> Iterator[State]:
    """Runs a tape in a graph, which refuses parts that need the learning rate, or the optimizer's momentum."""
    import tensorflow as tf

    variables = [tf.Variable(tf.zeros(t.shape), name=t.name.removesuffix(":0")) for t in case.tensors]

    @tf.function(autograph=False)
    def step_of(mine: list[Any]) -> list[Any]:
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(v * m) for v, m in zip(variables, mine, strict=True)])
        return hvd.DistributedGradientTape(tape, compression=g).gradient(loss, variables)

    for step in range(case.steps):
        mine = gradients(case, step)[hvd.rank()]
        found = step_of([tf.constant(mine[t.name]) for t in case.tensors])
        yield {t.name: x.numpy() for t, x in zip(case.tensors, found, strict=True)}


def by_mpi(case: Case, g: Grace, rank: int) -> Iterator[State]:
    import grace_ext.frameworks.numpy as gnp

    with gnp.Exchange(g) as exchange:
        for step in range(case.steps):
            yield exchange.step(gradients(case, step)[rank], lr=case.rate(step))


def local_options(case: Case) -> dict[str, Any]:
    many: list[dict[str, Any]] = [{"every": 2}, {"every": 1}, {"schedule": [1, 3]}, {"every": 2, "outer_lr": 0.5, "outer_momentum": 0.5}]
    return {} if "cser" in case.spec else many[case.data % 4]


def by_local_sgd(case: Case, make: Any, g: Grace, rank: int) -> Iterator[State]:
    """Runs LocalSGD. Yields the models after each step."""
    import torch

    named_parameters = [(t.name, torch.nn.Parameter(tensor(np.ones(t.shape, DTYPES[t.dtype])))) for t in case.tensors]
    optimizer = make(torch.optim.SGD([p for _, p in named_parameters], lr=0.125), named_parameters, compression=g, **local_options(case))
    for step in range(case.steps):
        optimizer.zero_grad()
        backward(named_parameters, gradients(case, step)[rank])
        optimizer.step()
        yield {name: array(p) for name, p in named_parameters}


def local_cluster(case: Case, g: Grace, rank: int) -> list[State]:
    """Returns this rank's models after each step in a LocalSGDCluster."""
    import torch

    from grace_ext.local import LocalSGDCluster

    cluster = LocalSGDCluster(g, SIZE, framework="torch", **local_options(case))
    models = [{t.name: tensor(np.ones(t.shape, DTYPES[t.dtype])) for t in case.tensors} for _ in range(SIZE)]
    cluster.start(models)
    found = []
    for step in range(case.steps):
        given = [{name: tensor(x) for name, x in mapping.items()} for mapping in gradients(case, step)]
        applied = cluster.gradients(given, lr=0.125)
        models = [
            {name: torch.add(p, x[name], alpha=-0.125) for name, p in model.items()} for model, x in zip(models, applied, strict=True)
        ]
        models = [dict(model) for model in cluster.step(models)]
        found.append({name: array(p) for name, p in models[rank].items()})
    return found


# --- the job ----------------------------------------------------------------------------------------------------------
class Engine:
    """An engine in this job: `run` yields this rank's results, `told` gathers an object of every rank."""

    def __init__(self, name: str):
        self.name, self.framework = name, {"tensorflow": "tensorflow", "mpirun": "numpy"}.get(name, "torch")
        if name == "mpirun":
            from mpi4py import MPI

            self.rank, self.told = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.allgather
            return
        if name == "tensorflow":
            import grace_ext.frameworks.tensorflow as hvd
        else:
            import grace_ext.frameworks.torch as hvd  # type: ignore[no-redef]
        self.hvd = hvd
        if name == "bind":
            import horovod.torch as plain

            plain.init()
            self.plain = plain
        hvd.init()
        self.rank, self.told = hvd.rank(), hvd.allgather_object

    def run(self, case: Case, g: Grace) -> Iterator[State]:
        if self.name == "mpirun":
            return by_mpi(case, g, self.rank)
        if self.name == "ddp":
            return by_ddp(case, g, self.hvd)
        if self.name == "tensorflow":
            return by_tensorflow(case, g, self.hvd)
        if self.name == "local_sgd":
            return by_local_sgd(case, self.hvd.LocalSGD, g, self.rank)
        if self.name == "bind":
            return by_torch(
                case, g, lambda optimizer, names: self.plain.DistributedOptimizer(
                    optimizer, named_parameters=names, compression=g.bind(names, optimizer=optimizer)
                ), self.rank,
            )  # fmt: skip
        return by_torch(case, g, lambda optimizer, names: self.hvd.DistributedOptimizer(optimizer, names, compression=g), self.rank)

    def compare(self, case: Case) -> str:
        """Returns what this rank found: 'held', 'refused' or what is wrong."""
        g = grace_ext.grace(case.spec, seed=case.seed)
        os.environ["GRACE_EXT_NODE"] = str(self.rank // case.per_node)
        got: list[State] = []
        try:
            for found in self.run(case, g):
                got.append(found)
        except GraceError as error:
            if not got and isinstance(error, REFUSALS):
                return "refused"
            return named(error)
        except Exception as error:
            return named(error)
        want = local_cluster(case, g, self.rank) if self.name == "local_sgd" else expected(case, g, self.framework)
        for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            odd = [t.name for t in case.tensors if not same(ours[t.name], theirs[t.name])]
            if odd:
                return f"step {step}: {odd} differ"
        return "held"


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.tobytes() == b.tobytes() or bool(np.isnan(a).all() and np.isnan(b).all()))


def main(name: str, first: str, last: str, out: str) -> None:
    quiet()
    engine = Engine(name)
    for seed in range(int(first), int(last)):
        case = case_of(seed, name)
        mine = "refused" if case is None else engine.compare(case)
        told = engine.told(mine)
        verdict = told[0] if len(set(told)) == 1 else f"rank 0: {told[0]}; rank 1: {told[1]}"
        if engine.rank == 0:
            with open(out, "a") as file:
                file.write(f"{seed} {verdict}\n")
    if hasattr(engine, "hvd"):
        engine.hvd.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
