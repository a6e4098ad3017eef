"""Tests privacy in real jobs: each case of jobs/privacy_*job.py is a test, and must hold on every rank."""

from __future__ import annotations

import pytest

import grace_ext
from grace_ext.errors import UnsupportedError
from grace_ext.planning.candidates import candidates, completed

from .support.launch import job
from .test_jobs import cases_of, held, held_in


@pytest.mark.parametrize("case", cases_of("privacy_job.py"))
@pytest.mark.parametrize(("engine", "ranks"), [("torchrun", 2), ("horovodrun", 2), ("python", 1)])
def test_wrapper(engine, ranks, case):
    assert case in held(engine, ranks, "privacy_job.py")


@pytest.mark.parametrize("case", cases_of("privacy_ddp_job.py"))
def test_ddp_hook(case):
    assert case in held("torchrun", 2, "privacy_ddp_job.py")


@pytest.mark.parametrize(("engine", "ranks"), [("mpirun", 3), ("python", 1)])
def test_exchange_over_mpi(engine, ranks, monkeypatch):
    monkeypatch.delenv("OPAL_PREFIX", raising=False)  # jobs must find Open MPI themselves
    pytest.importorskip("mpi4py")
    assert held_in(job(engine, ranks, "privacy_mpi_job.py")) == set(cases_of("privacy_mpi_job.py"))


def test_ways_of_training_that_do_not_make_gradients_private_refuse_a_spec_that_asks_for_it():
    torch = pytest.importorskip("torch")
    import grace_ext.frameworks.torch as hvd

    model = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match="fsdp_hook does not make gradients private"):
        hvd.fsdp_hook("gaussian | none", model, None)
    pytest.importorskip("horovod.torch")
    with pytest.raises(UnsupportedError, match="bind does not make gradients private"):
        grace_ext.grace("gaussian | none").bind(model.named_parameters())


@pytest.mark.parametrize("case", cases_of("privacy_tf_job.py"))
@pytest.mark.parametrize(("engine", "ranks"), [("horovodrun", 2), ("python", 1)])
def test_tensorflow(engine, ranks, case):
    pytest.importorskip("horovod.tensorflow")
    assert case in held(engine, ranks, "privacy_tf_job.py")


def test_bind_refuses_tensorflows_variables_with_a_spec_that_asks_for_it():
    tf = pytest.importorskip("tensorflow")
    pytest.importorskip("horovod.tensorflow")
    with pytest.raises(UnsupportedError, match="bind does not make gradients private"):
        grace_ext.grace("gaussian | none").bind([tf.Variable([1.0])])


def test_a_plan_refuses_it():
    for make in (completed, lambda text: candidates([text], 2)):
        with pytest.raises(UnsupportedError, match="plan and time what stands behind"):
            make("gaussian | topk")
