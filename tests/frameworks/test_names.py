"""Parameter names that ranks could not compare, hash or save are refused when a wrapper is made, or at the first step of what learns them
there; the error has the name and its place."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.driver.layout import check_names
from grace_ext.errors import NamesError
from grace_ext.local.cluster import LocalSGDCluster

BAD = {
    "a number": (3, "must be strings, got 3 (int) in place 1"),
    "None": (None, "must be strings, got None (NoneType) in place 1"),
    "bytes": (b"w", "must be strings, got b'w' (bytes) in place 1"),
    "a tuple": (("w", 1), "must be strings, got ('w', 1) (tuple) in place 1"),
    "a number that cannot be printed": (10**5000, "that cannot be printed (int) in place 1"),
    "a lone surrogate": ("w\ud800", "must be valid text, got 'w\\ud800' in place 1, whose character 1 is a lone surrogate"),
    "a name given twice": ("first", "more than once: 'first'"),
}
SPEC = "randomk(ratio=0.1) + residual"


def model() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(300))


def optimizer(name):
    one, two = model()
    hvd.DistributedOptimizer(torch.optim.SGD([one, two], 0.1), [("first", one), (name, two)], SPEC, simulate=True)


def local(name):
    one, two = model()
    hvd.LocalSGD(torch.optim.SGD([one, two], 0.1), [("first", one), (name, two)], SPEC, simulate=True)


def bound(name):
    one, two = model()
    grace_ext.grace(SPEC).bind([("first", one), (name, two)])


def ddp_hook(name):
    one, two = model()
    module = torch.nn.Module()
    module.named_parameters = lambda: [("first", one), (name, two)]
    hvd.ddp_comm_hook(SPEC, module)


def cluster(name, at=slice(None)):
    tensors = [{"first": np.ones(3, np.float32), "other": np.ones(300, np.float32)} for _ in range(2)]
    for rank in tensors[at]:
        rank[name] = rank.pop("other")
    grace_ext.LocalCluster(SPEC, 2).step(tensors)


def cluster_of_which_one_rank(name):
    cluster(name, slice(1, 2))


def local_cluster(name):
    LocalSGDCluster(SPEC, 2, every=1).start([{"first": np.ones(3, np.float32), name: np.ones(300, np.float32)}] * 2)


def only_the_names(name):
    check_names(["first", name])


BY_PAIRS = [optimizer, local, bound, ddp_hook, only_the_names]
BY_DICTIONARY = [cluster, cluster_of_which_one_rank, local_cluster]  # which has each name once
CASES = [(make, kind) for make in BY_PAIRS + BY_DICTIONARY for kind in BAD if make in BY_PAIRS or kind != "a name given twice"]


@pytest.fixture(autouse=True, scope="module")
def world():
    hvd.init()


@pytest.mark.parametrize(("make", "kind"), CASES, ids=[f"{make.__name__}, {kind}" for make, kind in CASES])
def test_names_that_are_none(make, kind):
    name, said = BAD[kind]
    with pytest.raises(NamesError, match=re.escape(said)) as raised:
        make(name)
    assert len(str(raised.value)) < 450


def test_names_of_a_compiled_model():
    """Torch puts '_orig_mod.' into the names of a compiled model; without it, two names may be the same."""
    one, two = model()
    with pytest.raises(NamesError, match="more than once: 'a.w'"):
        hvd.DistributedOptimizer(torch.optim.SGD([one, two], 0.1), [("a.w", one), ("a._orig_mod.w", two)], SPEC, simulate=True)
