"""grace_ext.save and load: the files, and what remains after a killed save, a full disk or damage."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import grace_ext
from grace_ext.checkpoints import checkpoint
from grace_ext.checkpoints.statefile import decode, encode
from grace_ext.errors import CheckpointError, GraceError, ParameterError

from .. import catalog
from . import resume_matrix

SPEC = "topk(ratio=0.1) + residual"
ROOT = Path(__file__).parents[2]


def trained(steps: int, size: int = 2, spec: str = SPEC) -> grace_ext.LocalCluster:
    cluster = resume_matrix.cluster_of(spec, size)
    resume_matrix.train(cluster, 0, steps)
    return cluster


def bits(cluster) -> list[dict[str, bytes]]:
    return [{key: x.tobytes() for key, x in state["state"].items()} for state in cluster.state_dict()["ranks"]]


def test_every_part_resumes_in_a_new_process(tmp_path):
    """Every part resumes exactly, in one combination each; benchmarks/reliability/resume.py runs all combinations."""
    outcomes = resume_matrix.compare(catalog.shelf(), tmp_path)
    assert len(outcomes) > 60
    assert {spec: outcome for spec, outcome in outcomes.items() if outcome != "equal"} == {}


def test_arrays_of_all_kinds_come_back():
    tree = {
        "a/b": {"c": np.arange(3, dtype=np.uint8)}, "a": {"b/c": np.arange(4, dtype=np.int64)}, "0-d": np.array(2.5),
        "empty": np.zeros((0, 3), np.float32), "bf16": np.ones((2, 3), ml_dtypes.bfloat16), "bf16 0-d": np.array(1, ml_dtypes.bfloat16),
        "f16": np.ones(2, np.float16), "strided": np.arange(12, dtype=np.float32).reshape(3, 4).T[::2], "flag": np.array([True, False]),
        "values": {"step": 3, "name": "x", "none": None, "list": [1, [2]], "nothing": {}},
    }  # fmt: skip
    back = decode(encode(tree))

    def same(a, b):
        if isinstance(a, dict):
            return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
        if isinstance(a, np.ndarray):
            return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        return type(a) is type(b) and a == b

    assert same(tree, back) and b"pickle" not in encode(tree)


def test_the_folder_says_what_it_is(tmp_path):
    grace_ext.save(trained(3), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["version"], manifest["size"], manifest["step"], manifest["spec"]) == (1, 2, 3, str(grace_ext.grace(SPEC)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([entry["name"] for entry in manifest["files"]] + ["manifest.json"])
    grace_ext.save(trained(4), tmp_path)
    after = json.loads((tmp_path / "manifest.json").read_text())
    assert after["generation"] == manifest["generation"] + 1
    assert len(list(tmp_path.iterdir())) == 3  # the older generation is gone


@pytest.mark.parametrize("framework", ["numpy", "torch", "tensorflow"])
def test_any_array_library_reads_what_another_wrote(tmp_path, framework):
    cluster = trained(3)
    grace_ext.save(cluster, tmp_path)
    other = grace_ext.LocalCluster(cluster.grace, 2, framework=framework)
    assert grace_ext.load(other, tmp_path) == 3
    expected = trained(4)
    other.step([resume_matrix.gradients(rank, 3) for rank in range(2)], lr=0.1)
    got = [{key: np.asarray(x).tobytes() for key, x in state["state"].items()} for state in other.state_dict()["ranks"]]
    assert got == bits(expected)


# --- other numbers of ranks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 2)])
def test_another_number_of_ranks_is_logged_with_the_norm(tmp_path, caplog, old, new):
    cluster = trained(4, old)
    grace_ext.save(cluster, tmp_path)
    other = grace_ext.LocalCluster(cluster.grace, new)
    assert grace_ext.load(other, tmp_path) == 4
    owed = np.mean([np.float64(state["state"]["residual/a"]) for state in cluster.state_dict()["ranks"]], axis=0)
    now = np.mean([np.float64(state["state"]["residual/a"]) for state in other.state_dict()["ranks"]], axis=0)
    np.testing.assert_allclose(now, owed, rtol=1e-6)
    assert [f"from {old} to {new} ranks" in record.getMessage() for record in caplog.records] == [True]
    other.step([resume_matrix.gradients(rank, 4) for rank in range(new)])
    with pytest.raises(ParameterError, match="'keep'"):
        grace_ext.load(other, tmp_path, resize="sum")


# --- what goes wrong ----------------------------------------------------------------------------------------------------
def refused(opt, folder, match: str) -> None:
    """Asserts that loading raises and changes nothing."""
    before, step = bits(opt), opt.drivers[0].step
    with pytest.raises(CheckpointError, match=match):
        grace_ext.load(opt, folder)
    assert bits(opt) == before and opt.drivers[0].step == step


def test_no_checkpoint(tmp_path):
    refused(trained(2), tmp_path, "no manifest.json")
    refused(trained(2), tmp_path / "nowhere", "no manifest.json")


def test_damage_is_found(tmp_path):
    cluster = trained(3)
    grace_ext.save(cluster, tmp_path)
    victim = next(tmp_path.glob("rank-00001*"))
    good = victim.read_bytes()
    for bad in (good[:-1], b"", good[:100] + bytes([good[100] ^ 1]) + good[101:]):
        victim.write_bytes(bad)
        refused(trained(2), tmp_path, "rank-00001.*damaged")
    victim.unlink()
    refused(trained(2), tmp_path, "rank-00001")
    victim.write_bytes(good)
    manifest = (tmp_path / "manifest.json").read_text()
    for bad in (manifest[:-5], "[]", "{}", manifest.replace('"version": 1', '"version": 2')):
        (tmp_path / "manifest.json").write_text(bad)
        refused(trained(2), tmp_path, "manifest.json.*(damaged|version)")
    grace_ext.save(cluster, tmp_path)  # a new save repairs the folder
    assert grace_ext.load(trained(2), tmp_path) == 3


def test_a_file_that_is_no_state_is_refused():
    whole = encode({"state": {"x": np.zeros(3, np.float32)}})
    for bad in (b"", b"\0" * 8, whole[:20], whole[:-2], b"\xff" * 64, whole.replace(b'\\"version\\": 1', b'\\"version\\": 9')):
        with pytest.raises(CheckpointError):
            decode(bad)


def test_another_spec_is_refused(tmp_path):
    grace_ext.save(trained(3, spec="topk(ratio=0.2) + residual"), tmp_path)
    refused(trained(2), tmp_path, r"ratio=0\.2.*ratio=0\.1")


def test_other_parameters_are_refused(tmp_path):
    cluster = grace_ext.LocalCluster(grace_ext.grace(SPEC), 2)
    cluster.step([{"other": np.ones(40, np.float32)}] * 2)
    grace_ext.save(cluster, tmp_path)
    refused(trained(2), tmp_path, "other")


def test_what_keeps_nothing_is_refused(tmp_path):
    with pytest.raises(GraceError, match="keeps no memory of compression"):
        grace_ext.save(object(), tmp_path)


def test_a_failed_write_is_an_error_and_leaves_the_last_one(tmp_path, monkeypatch):
    grace_ext.save(trained(3), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match="rank 0: OSError.*No space left"):
        grace_ext.save(trained(4), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    assert grace_ext.load(trained(2), tmp_path) == 3


# --- a save that ends in the middle ---------------------------------------------------------------------------------------
def forked(*cases: tuple[str, int, Path]) -> list[dict]:
    """Returns per case how a save of step 5 ended in its own process, by tests/checkpoints/save_and_die.py."""
    given = json.dumps([[what, at, str(folder)] for what, at, folder in cases])
    done = subprocess.run([sys.executable, "-m", "tests.checkpoints.save_and_die"], cwd=ROOT, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_killed_save_leaves_the_last_one_or_the_new_one(tmp_path):
    """After SIGKILL before any fsync, rename or removal of a save, the folder loads as the complete checkpoint of step 3 or of step 5, and
    the next save succeeds and cleans up."""
    calls = 11  # three files: fsync, rename, fsync of the folder; then two old files are removed
    folders = {at: tmp_path / str(at) for at in range(1, calls + 2)}
    for folder in folders.values():
        grace_ext.save(trained(3), folder)
    ended = forked(*[("kill", at, folder) for at, folder in folders.items()])
    assert [one["signal"] for one in ended] == [signal.SIGKILL] * calls + [0]
    found = []
    for folder in folders.values():
        again = grace_ext.LocalCluster(grace_ext.grace(SPEC), 2)
        found.append(grace_ext.load(again, folder))
        assert bits(again) == bits(trained(found[-1]))
        grace_ext.save(trained(6), folder)
        assert len(list(folder.iterdir())) == 3
    assert found == [3] * 8 + [5] * 4  # the 8th call, the rename of the manifest, makes the new checkpoint valid


def test_a_disk_that_takes_no_more(tmp_path):
    grace_ext.save(trained(3), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for ended in forked(*[("limit", limit, tmp_path) for limit in (0, 100, 2000)]):
        assert ended["signal"] == 0 and "rank 0: OSError" in ended["said"] and "too large" in ended["said"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("inside", ["", "folder"])
def test_a_target_that_is_no_folder(tmp_path, inside):
    """A file, or a device such as /dev/full, is no folder; the error says so."""
    (tmp_path / "file").write_text("")
    cluster = grace_ext.LocalCluster("topk + residual", 2)
    with pytest.raises(CheckpointError, match="cannot save: rank 0: .*file.* is no folder, or lies in none: give a folder"):
        grace_ext.save(cluster, tmp_path / "file" / inside)
