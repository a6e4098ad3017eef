"""Tests TensorFlow and Keras 3 in real jobs (each case of jobs/tf_*_job.py is a test), and what needs no job."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from grace_ext.cli.check import DONE

from .support.launch import environment, launcher, run
from .test_jobs import cases_of, held

if importlib.util.find_spec("tensorflow") is None:
    pytest.skip("TensorFlow is not installed: pip install 'grace_ext[tensorflow]'", allow_module_level=True)


@pytest.mark.parametrize("case", cases_of("tf_job.py"))
def test_wrapper(case):
    assert case in held("horovodrun", 2, "tf_job.py")


@pytest.mark.parametrize("case", cases_of("tf_scripts_job.py"))
def test_other_peoples_scripts(case):
    assert case in held("horovodrun", 2, "tf_scripts_job.py")


@pytest.mark.parametrize("case", cases_of("tf_graph_job.py"))
def test_graph(case):
    assert case in held("horovodrun", 2, "tf_graph_job.py")


@pytest.mark.parametrize("case", cases_of("tf_bind_job.py"))
def test_bind(case):
    assert case in held("horovodrun", 2, "tf_bind_job.py")


@pytest.mark.parametrize("case", cases_of("tf_policy_job.py"))
def test_policies(case):
    assert case in held("horovodrun", 2, "tf_policy_job.py")


def python(code: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**environment(), **more}, capture_output=True, text=True, timeout=120)


def test_another_keras_backend_is_refused_by_name():
    code = (
        "import keras, grace_ext.frameworks.tensorflow as hvd\n"
        "try: hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression='none')\n"
        "except NotImplementedError as error: print('REFUSED', error)\n"
    )
    done = python(code, KERAS_BACKEND="torch")
    assert "REFUSED" in done.stdout and "'torch' backend" in done.stdout, done.stderr[-2000:]


def test_without_horovod_the_error_says_how_to_get_it():
    code = (
        "import sys; sys.modules['horovod.tensorflow'] = None\n"
        "import numpy as np, grace_ext, grace_ext.frameworks.tensorflow as hvd\n"
        "print(grace_ext.LocalCluster(grace_ext.grace('none'), 1, framework='tensorflow').step([{'w': np.ones(2, np.float32)}]))\n"
        "hvd.init()\n"
    )
    done = python(code)
    assert "tf.Tensor" in done.stdout and "make horovod" in done.stderr, done.stdout + done.stderr[-2000:]


def test_torchrun_is_refused():
    """Under torchrun, Horovod would treat each rank as its own job of one rank, so this raises."""
    command = [*launcher("torchrun", 2), "-m", "grace_ext.frameworks.selfcheck", "tensorflow"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode and "Use horovodrun or mpirun" in done.stderr, done.stderr[-2000:]


def test_selfcheck():
    assert DONE in run([*launcher("horovodrun", 2), "-m", "grace_ext.frameworks.selfcheck", "tensorflow"])


def test_plain_python_is_one_rank_and_compresses_only_when_asked():
    code = (
        "import keras, numpy as np, grace_ext, grace_ext.frameworks.tensorflow as hvd\n"
        "hvd.init(); assert hvd.size() == 1 and hvd.gloo_enabled()\n"
        "for simulate, expected in ((False, [-1, -2]), (True, [0, -2])):\n"
        "    v = keras.Variable(np.zeros(2, np.float32))\n"
        "    g = grace_ext.grace('topk(ratio=0.5) + residual')\n"
        "    o = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=g, simulate=simulate)\n"
        "    o.apply([np.array([1, 2], np.float32)], [v])\n"
        "    assert np.asarray(v.numpy()).tolist() == expected, (simulate, v.numpy())\n"
        "v = keras.Variable(np.zeros(2, np.float32))\n"
        "o = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression='topk(ratio=0.5) + dgc(momentum=0.5)')\n"
        "for _ in range(2): o.apply([np.array([1, 2], np.float32)], [v])\n"
        "assert np.asarray(v.numpy()).tolist() == [-2.5, -5], v.numpy()\n"
        "print('ALONE OK')\n"
    )
    done = python(code)
    assert "ALONE OK" in done.stdout, done.stderr[-2000:]


def test_local_cluster_takes_variables_and_sparse_gradients():
    """LocalCluster also takes tf.Variables and IndexedSlices, which the contract suite does not test."""
    import tensorflow as tf

    import grace_ext

    cluster = grace_ext.LocalCluster(grace_ext.grace("none"), 2, framework="tensorflow")
    sparse = tf.IndexedSlices(tf.constant([3.0, 4.0]), tf.constant([1, 1]), dense_shape=tf.constant([2]))
    assert cluster.step([{"w": tf.Variable([1.0, 2.0])}, {"w": sparse}])["w"].numpy().tolist() == [0.5, 4.5]
