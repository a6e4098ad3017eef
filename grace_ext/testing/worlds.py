"""The tensor libraries that the tests run on (WORLDS lists them), and a recorder for the collectives of a LocalCluster."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

import grace_ext.cluster as cluster_module

from .. import Grace, LocalCluster
from ..arrays import libraries
from ..exchange import lockstep

#: The learning rate of tests that do not depend on it: a power of two, so that multiplying by it is exact.
LR = 0.125


@dataclass(frozen=True, eq=False)
class World:
    """One implementation of the array protocol. tensor, array: convert numpy arrays to its user's tensors, and back. computes: whether its
    array code is its own. The others run code that another world tests, on tensors of their own: one spec of each part is enough."""

    name: str
    framework: str
    ops: Any
    tensor: Callable[[np.ndarray], Any]
    array: Callable[[Any], np.ndarray]
    mutable: bool = True  # whether a user can write into these tensors
    native: bool = True  # whether LocalCluster(framework=...) uses these ops by itself
    computes: bool = False

    def cluster(self, g: Grace, size: int, ranks_per_node: int = 1) -> LocalCluster:
        if self.native:
            return LocalCluster(g, size, ranks_per_node=ranks_per_node, framework=self.framework)
        with mock.patch.object(libraries, "ops_for_framework", lambda framework: self.ops):
            return LocalCluster(g, size, ranks_per_node=ranks_per_node, framework=self.framework)

    def in_place(self, cluster: LocalCluster) -> LocalCluster:
        """Returns the cluster, which from now on writes results over the gradients, as the torch wrapper does."""
        for driver in cluster.drivers:
            driver._in_place = True
        return cluster

    def tensors(self, mappings: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
        return [{name: self.tensor(array) for name, array in mapping.items()} for mapping in mappings]

    def arrays(self, mapping: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: self.array(tensor) for name, tensor in mapping.items()}

    def step(self, cluster: LocalCluster, mappings: Sequence[Mapping[str, np.ndarray]], lr: float = LR) -> dict[str, np.ndarray]:
        """Calls cluster.step with numpy arrays, converted to this library's tensors; returns rank 0's results as numpy arrays."""
        out = cluster.step(self.tensors(mappings), lr=lr)
        return self.arrays(out[0] if isinstance(out, list) else out)

    def everywhere(
        self, cluster: LocalCluster, mappings: Sequence[Mapping[str, np.ndarray]], lr: float = LR
    ) -> list[dict[str, np.ndarray]]:
        """Does as `step`, and returns the results of every rank."""
        returned: list[Any] = []
        original = cluster_module.run_lockstep

        def remember(ranks, *how):
            returned.extend(original(ranks, *how))
            return returned

        with mock.patch.object(cluster_module, "run_lockstep", remember):
            self.step(cluster, mappings, lr)
        return [self.arrays(mapping) for mapping in returned]


def _numpy() -> list[World]:
    from ..arrays.compiled import host_ops
    from ..arrays.numpy import NumpyOps

    plain, compiled = NumpyOps(), host_ops(NumpyOps)
    return [
        World("numpy", "numpy", compiled, lambda a: a, np.asarray, computes=True),
        World("numpy-plain", "numpy", plain, lambda a: a, np.asarray, native=False, computes=True),
    ]


def _torch() -> tuple[list[World], list[World]]:
    """Returns the worlds of tensors on the host, and that of the pretended device."""
    import torch

    torch.set_num_threads(1)  # the tensors are small, and the machine may be shared

    from ..arrays.compiled import host_ops
    from ..frameworks.torch.ops import HostOps, TorchOps
    from .pretended_device import DeviceTensor, PretendedOps

    def tensor(array: np.ndarray) -> torch.Tensor:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        # A copy with the same strides, so that non-contiguous arrays stay so (torch has no negative strides).
        made = torch.empty_strided(array.shape, [s // array.itemsize for s in array.strides], dtype=getattr(torch, array.dtype.name))
        return made.copy_(torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)))

    def array(t: torch.Tensor) -> np.ndarray:
        assert isinstance(t, torch.Tensor) and not isinstance(t, DeviceTensor)
        if t.dtype is torch.bfloat16:
            import ml_dtypes

            return t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return t.numpy()

    def to_device(array: np.ndarray) -> DeviceTensor:
        return DeviceTensor(tensor(array))

    def from_device(t: torch.Tensor) -> np.ndarray:
        assert isinstance(t, DeviceTensor), "a result is not on the device of the gradients"
        return array(t.held)

    return [
        World("torch-host", "torch", host_ops(HostOps), tensor, array),
        World("torch-device", "torch", TorchOps("cpu"), tensor, array, native=False, computes=True),
    ], [World("torch-cuda", "torch", PretendedOps(), to_device, from_device, native=False)]


def _tensorflow() -> list[World]:
    import tensorflow as tf

    from ..arrays.compiled import host_ops
    from ..frameworks.tensorflow.ops import TensorFlowOps

    def array(t: tf.Tensor) -> np.ndarray:
        assert isinstance(t, tf.Tensor)
        return t.numpy()

    return [World("tensorflow", "tensorflow", host_ops(TensorFlowOps), tf.constant, array, mutable=False)]


def _there(module: str) -> bool:
    """Whether a module is installed. If it is but cannot be imported, tests fail; they are not skipped."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


_ON_HOST, _ON_DEVICE = _torch() if _there("torch") else ([], [])
WORLDS = _numpy() + _ON_HOST + (_tensorflow() if _there("tensorflow") else [])
#: WORLDS, and one whose tensors are on a pretended device. It runs the code of world torch-device, so that only tests of parts as a whole
#: need it: they show that nothing mixes devices.
WITH_DEVICE = WORLDS + _ON_DEVICE
NUMPY = WORLDS[0]


@dataclass
class Seen:
    """Records one collective of a LocalCluster: its kind, label and dtype, and the bytes and nbytes of every rank's own buffer."""

    kind: str
    label: str
    dtype: str
    buffers: list[bytes]
    nbytes: list[int]


@contextmanager
def tapped(change: Callable[[Sequence[Any], Any], Sequence[Any]] | None = None) -> Iterator[list[Seen]]:
    """Records all collectives of all LocalClusters, except the agreement at the first step; `change(collectives, ops)` may replace them."""
    seen: list[Seen] = []
    original = lockstep.execute

    def execute(collectives, ops):
        if collectives[0].label.startswith("agree"):
            return original(collectives, ops)
        if change is not None:
            collectives = change(collectives, ops)
        arrays = [np.array(ops.host(c.array)) for c in collectives]
        sizes = [c.nbytes for c in collectives]
        first = collectives[0]
        seen.append(Seen(first.kind, first.label, first.dtype, [a.tobytes() for a in arrays], sizes))
        return original(collectives, ops)

    with mock.patch.object(lockstep, "execute", execute):
        yield seen


def states(cluster: LocalCluster, world: World) -> list[dict[str, np.ndarray]]:
    """Returns the state of every rank, as numpy arrays."""
    saved = cluster.state_dict()["ranks"]
    return [{key: np.array(world.ops.host(array)) for key, array in rank["state"].items()} for rank in saved]


def same_bits(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Whether two mappings have the same names, shapes, dtypes and bits."""
    return set(a) == set(b) and all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)
