"""benchmarks/gpu_check.py runs dry on a CPU, with all sections, and exits with 1 if there is a fault."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import bits, costs, kernels, machine, speed, training
from grace_ext import LocalCluster, compressors
from grace_ext.testing.pretended_device import PretendedOps

from ..frameworks.support.launch import ROOT, environment

BUCKETS = {"20 tensors": ((40, 40),) * 20}
SPECS = ["none + none", "efsignsgd + residual", "powersgd(rank=2) + residual"]


def found(name: str, folder: Path) -> tuple[int, dict]:
    """Runs one section dry. Returns the exit status, and what was written of the section."""
    file = folder / "made" / "found.json"
    status = gpu_check.main([name, "--dry", "--json", str(file)])
    return status, json.loads(file.read_text())["sections"][name]


def test_all_sections_run_dry(tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--dry", "--json", str(file)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    document = json.loads(file.read_text())
    assert list(document["sections"]) == list(gpu_check.PLACES) and document["dry"] and document["device"].startswith("none")
    assert document["torch"] == torch.__version__ and document["triton"]
    for name, section in document["sections"].items():
        assert section["notes"][0].startswith("a dry run, on "), name
        assert section["checks"] or "not run" in section["notes"][1], name
    assert [row[0] for row in document["sections"]["waits"]["rows"]] == list(costs.device_budgets.SPECS)
    assert len(document["sections"]["speed"]["rows"]) == len(compressors.names())
    assert all(cells[3] == "0" for cells in document["sections"]["fsdp"]["rows"][:2])
    assert "all checks hold" in done.stdout and done.stdout.count("(a dry run") == len(gpu_check.PLACES)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(bits, "specs", lambda dry: SPECS)
    monkeypatch.setattr(costs.device_budgets, "SPECS", SPECS[:2])


def test_other_bits_are_a_fault(few, tmp_path, monkeypatch):
    assert found("bits", tmp_path)[0] == 0
    original = PretendedOps.pack_signs
    monkeypatch.setattr(PretendedOps, "pack_signs", lambda self, x: original(self, -x))
    status, section = found("bits", tmp_path)
    assert status == 1 and [row[0] for row in section["rows"]] == SPECS[1:2]
    assert "payload" in section["rows"][0][1] and "elements differ" in section["rows"][0][1]


def test_a_product_that_is_off_is_a_fault(few, tmp_path, monkeypatch):
    """Payloads of powersgd may differ in their last bits, but results may not be 3% off."""
    original = PretendedOps.product
    monkeypatch.setattr(PretendedOps, "product", lambda self, *a, **more: original(self, *a, **more) * 1.03)
    status, section = found("bits", tmp_path)
    assert status == 1 and SPECS[2] in [row[0] for row in section["rows"]]


def test_one_more_wait_is_a_fault(few, tmp_path, monkeypatch):
    measured = {spec: {name: costs.device_budgets.measure(spec, shapes) for name, shapes in BUCKETS.items()} for spec in SPECS[:2]}
    budgets = tmp_path / "budgets.json"
    budgets.write_text(json.dumps(measured))
    monkeypatch.setattr(costs.device_budgets, "FILE", budgets)
    original = LocalCluster.step

    def step(self, gradients, lr=None):
        for rank in gradients:
            float(next(iter(rank.values())).reshape(-1)[0])
        return original(self, gradients, lr)

    assert found("waits", tmp_path)[0] == 0
    monkeypatch.setattr(LocalCluster, "step", step)
    status, section = found("waits", tmp_path)
    assert status == 1 and section["checks"][0]["measured"] == 2


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('CASE case_signs ok\\nCASE case_codes failed on rank 0:\\nTraceback:\\nAssertionError: [7]\\n\\n')", "AssertionError: [7]"),
        ("print('CASE case_signs ok', flush=True); raise SystemExit('no LLVM')", "did not run: no LLVM"),
    ],
)
def test_a_kernel_of_other_bytes_is_a_fault(program, said, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="pip install 'grace_ext[triton]'")
    job = tmp_path / "job.py"
    job.write_text(program)
    monkeypatch.setattr(kernels, "JOB", job)
    status, section = found("kernels", tmp_path)
    assert status == 1 and section["rows"] == [["case_signs", "ok"], ["case_codes", said]]


@pytest.mark.parametrize("change", [{"difference": 0.1}, {"digest": "other"}, {"loss": float("nan")}])
def test_training_that_differs_is_a_fault(change, tmp_path, monkeypatch):
    row = {"how": "ddp", "spec": "none + none", "ms": 1.0, "loss": 2.0, "difference": 0.0, "digest": "one"}
    monkeypatch.setattr(training, "trained", lambda *_: [[row], [row]])
    assert found("ddp", tmp_path)[0] == 0
    monkeypatch.setattr(training, "trained", lambda *_: [[{**row, **change}], [row]])
    assert found("ddp", tmp_path)[0] == 1


def test_an_error_of_one_spec_or_section_hides_no_others(tmp_path, monkeypatch):
    def fails(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(speed, "measured", lambda machine, world, spec: fails() if spec.startswith("topk") else [spec, *[0] * 7])
    status, section = found("speed", tmp_path)
    assert status == 1 and section["checks"][0]["measured"] == 2 and ["MemoryError: no room"] == [
        row[1] for row in section["rows"] if row[0].startswith("topk(ratio=0.01) + residual")
    ]  # fmt: skip
    monkeypatch.setattr(training, "trained", fails)
    status, section = found("ddp", tmp_path)
    assert status == 1 and section["checks"][0]["text"] == "the section ended with MemoryError: no room"


def test_without_a_gpu_it_is_refused_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["bits"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "is_available() is False" in said.err and "--dry" in said.err
    with mock.patch("importlib.util.find_spec", lambda name: None):
        assert "pip install 'grace_ext[torch]'" in str(machine.refusal(True))


def test_the_list(capsys):
    assert gpu_check.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(gpu_check.PLACES)


def test_names_of_both_profilers_are_understood():
    cuda = ["void at::native::elementwise_kernel<...>", "Memset (Device)", "Memcpy DtoD (Device -> Device)"]
    copies = ["Memcpy HtoD (Pageable -> Device)", "Memcpy DtoH (Device -> Pinned)", "CopyHostToDevice", "CopyDeviceToHost"]
    assert machine.tally([*cuda, *copies]) == {"launches": 3, "uploads": 2, "downloads": 2}


def test_waits_are_counted_by_torchs_warnings(monkeypatch):
    """Without a GPU: torch's profiler has the fields that are read, and each of torch's warnings counts."""
    modes, profile = [], torch.profiler.profile
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile(activities=activities[:1]))

    def call():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", UserWarning)
        warnings.warn("the mode does not yet detect all synchronizing operations", UserWarning)
        torch.ones(3) + 1

    assert machine.counted(call) == {"waits": 2, "launches": 0, "uploads": 0, "downloads": 0}
    assert modes == ["warn", "default"]
