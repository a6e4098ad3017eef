"""Runs the cases of the Triton kernels, in a process of its own: on the GPU, or in a dry run a few of them in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

from benchmarks.exchange.jobs import ROOT, environment
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.section import Found, Progress, Section, none_of
from grace_ext.papers.experiment import in_units

JOB = ROOT / "tests" / "frameworks" / "jobs" / "triton_job.py"
#: The cases of a dry run. All cases take the interpreter longer, and tests/frameworks/test_triton.py runs them.
FEW = ("case_signs", "case_codes")


def outcomes(said: str) -> dict[str, str]:
    """Returns how each case ended, from what the job printed: 'ok', or the last line of its traceback."""
    pieces = re.split(r"^CASE (\w+) (ok|failed)", said, flags=re.MULTILINE)
    return {
        name: "ok" if how == "ok" else (text.split("\n\n")[0].strip().splitlines() or ["failed"])[-1]
        for name, how, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True)
    }


def run(machine: Machine, progress: Progress) -> Found:
    columns = ["case", "outcome"]
    if importlib.util.find_spec("triton") is None:
        return Found(columns, [], [], notes=["not run: Triton is not installed, so the library uses plain torch operations"])
    cases = FEW if machine.dry else tuple(re.findall(r"^def (case_\w+)", JOB.read_text(), re.MULTILINE))
    chosen = {"TRITON_INTERPRET": str(int(machine.dry)), "DEVICE": str(machine.device), "GRACE_EXT_KERNELS": "1"}
    said, done = "", in_units(progress, len(cases))
    job = subprocess.Popen(
        [sys.executable, str(JOB), *cases], env={**environment(), **chosen}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with job:
        for line in job.stdout or ():
            said += line
            if line.startswith("CASE"):
                done()
    ended = outcomes(said)
    last = (said.strip().splitlines() or ["it said nothing"])[-1][:200]
    rows = [[name, ended.get(name, f"did not run: {last}")] for name in cases]
    notes = ["each kernel's bytes against those of the compiled loops, numpy and plain torch operations"]
    if machine.dry:
        notes = [f"not run on a GPU: {len(cases)} cases in Triton's interpreter; tests/frameworks/test_triton.py has all, and compilation"]
    return Found(columns, rows, [none_of("cases that failed", len(cases), (row for row in rows if row[1] != "ok"))], notes=notes)


SECTION = Section("kernels", "the Triton kernels give the bytes of plain operations", "two cases in Triton's interpreter", run)
