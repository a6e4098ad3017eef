"""docs/gpu.md says what the budgets and the script say, and README says the same of devices."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("gpu_page", ROOT / "tools" / "gpu_page.py")
assert spec and spec.loader
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
PAGE, README = tool.PAGE.read_text(), (ROOT / "README.md").read_text()


def test_the_tables_are_what_the_budgets_say():
    done = subprocess.run([sys.executable, "tools/gpu_page.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_other_budgets_make_another_page(tmp_path, monkeypatch):
    budgets = json.loads(tool.BUDGETS.read_text())
    budgets["none + none"]["20 tensors"]["waits"] = 12345
    monkeypatch.setattr(tool, "BUDGETS", tmp_path / "budgets.json")
    tool.BUDGETS.write_text(json.dumps(budgets))
    made = tool.page(PAGE)
    assert "| 12,345 |" in made and made != PAGE
    assert made.replace(" 12,345 ", "").count("\n") == PAGE.count("\n")
    with pytest.raises(SystemExit, match="put them back"):
        tool.page("no tables")


def test_the_least_is_arithmetic():
    """By hand: 25 MiB are 6,553,600 elements; of 25 bytes each at 4.3 TB/s."""
    row = next(line for line in tool.rooflines() if line.startswith("| efsignsgd"))
    assert "| 24 + n/8 | 38 | 96 |" in row and 6_553_600 * 25 / 4.3e12 == pytest.approx(38e-6, rel=0.01)


def devices(text: str) -> list[str]:
    return re.search(r"\| device \| state \|\n\|---\|---\|\n((?:\|.*\n)+)", text)[1].splitlines()


def test_readme_and_the_page_say_the_same_of_devices():
    assert devices(README) == devices(PAGE) and len(devices(PAGE)) == 5
    assert README.index("| device | state |") < README.index("## Try it"), "it belongs to the first screen"


def test_the_page_lists_the_sections_of_the_script():
    from benchmarks.gpu_check import PLACES

    table = PAGE.split("| section |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(PLACES)


def test_what_is_not_run_is_said():
    """As long as there is no result of a GPU, the page says so in its first sentence."""
    results = list((ROOT / "benchmarks" / "results").glob("gpu*.json"))
    assert bool(results) != ("Nothing here has been run on a real GPU yet" in PAGE)
