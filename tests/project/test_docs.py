"""Generated pages are up to date, and the plug-in of docs/extending.md is found by its names and passes the contract tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples" / "plugin"


def run(command: list[str], **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **more}, capture_output=True, text=True, timeout=600)


#: The files whose tests docs/faults.md names: all of them, or some.
WHOLE_IN_FAULTS = ("jobs/scripts_job.py", "jobs/refused_job.py", "jobs/tf_scripts_job.py")
SHARDED_IN_FAULTS = ("jobs/fsdp_use_job.py", "jobs/fsdp_refused_job.py", "jobs/fsdp_low_rank_job.py")
JOBS_IN_FAULTS = (*WHOLE_IN_FAULTS, "jobs/flat_job.py", *SHARDED_IN_FAULTS, "jobs/tf_job.py", "test_launchers.py")


def test_the_pages_of_the_parts_are_what_the_code_says():
    done = run([sys.executable, "tools/catalogue.py", "--check"])
    assert done.returncode == 0, done.stderr


def test_the_performance_page_is_what_the_results_say():
    pytest.importorskip("matplotlib", reason="pip install 'grace_ext[examples]'")
    done = run([sys.executable, "tools/performance.py", "--check"])
    assert done.returncode == 0, done.stderr


def test_the_reliability_page_is_what_the_results_say():
    done = run([sys.executable, "tools/reliability.py", "--check"])
    assert done.returncode == 0, done.stderr


def test_a_reliability_page_is_made_of_the_topics_that_there_are(tmp_path):
    """The page shows the title, paragraph, command and rows of each topic, in its fixed order; --check detects a change of one cell."""
    results, page = tmp_path / "results", tmp_path / "page.md"
    results.mkdir()

    def tool(*more: str) -> subprocess.CompletedProcess:
        return run([sys.executable, "tools/reliability.py", "--results", str(results), "--page", str(page), *more])

    assert tool().returncode == 1 and tool("--check").returncode == 0
    made = {"title": "Soak", "machine": "m", "text": "What was done.", "columns": ["case", "held", "command"],
            "rows": [["a|b", True, "pytest x"], ["c", False, "pytest y"]], "commands": ["python z.py"]}  # fmt: skip
    (results / "soak.json").write_text(json.dumps(made))
    (results / "resume.json").write_text(json.dumps({**made, "title": "Resume", "commands": []}))
    assert tool().returncode == 0 and tool("--check").returncode == 0
    text = page.read_text()
    assert text.index("## Resume") < text.index("## Soak") and "By `python z.py`: m." in text
    assert "| a\\|b | yes | `pytest x` |" in text and "| c | **no** | `pytest y` |" in text
    made["rows"][1][1] = True
    (results / "soak.json").write_text(json.dumps(made))
    assert tool("--check").returncode == 1


def test_the_readme_counts_and_names_the_shelf():
    """The README's table names every part, and the numbers of parts are right."""
    import grace_ext

    text = (ROOT / "README.md").read_text()
    counts = [len(module.names()) for module in (grace_ext.compressors, grace_ext.memories, grace_ext.communicators)]
    assert [int(n) for n in re.search(r"Included: (\d+) compressors, (\d+) memories and (\d+) communicators", text).groups()] == counts
    for module in (grace_ext.compressors, grace_ext.memories, grace_ext.communicators):
        for name in module.names():
            assert name in ("none", "pipeline") or re.search(rf"`{name}[`(]", text), name


def test_the_table_of_faults_has_every_test():
    """docs/faults.md has one row for each case of other people's scripts and of refused uses, and no row without a test."""
    part = (ROOT / "docs/faults.md").read_text().split("## You did, you see")[1].split("\n## ")[0]
    rows = [row.split("|")[-2].strip(" `") for row in part.splitlines() if row.startswith("| ")]
    rows = [row for row in rows if row != "test"]
    tests = ROOT / "tests/frameworks"
    of = {name: re.findall(r"^def (?:case_)?(\w+)", (tests / name).read_text(), re.MULTILINE) for name in JOBS_IN_FAULTS}
    expected = {name for names in of.values() for name in names}
    assert len(set(rows)) == len(rows)
    assert set(rows) <= expected, sorted(set(rows) - expected)
    for name in WHOLE_IN_FAULTS:
        cases = re.findall(r"^def case_(\w+)", (tests / name).read_text(), re.MULTILINE)
        assert set(cases) <= set(rows), sorted(set(cases) - set(rows))


def test_links_of_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> str:
    """Installs the plug-in as users would, in its own folder (from a copy, because pip leaves files beside the sources); returns a path."""
    folder = tmp_path_factory.mktemp("plugin")
    copy = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("source") / "plugin")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(folder), str(copy)]
    done = run(command)
    assert done.returncode == 0, done.stderr
    return f"{folder}{os.pathsep}{ROOT}"


def test_the_plugin_is_found_by_its_entry_points(installed):
    done = run([sys.executable, "-m", "grace_ext", "show", "blur", "--json"], PYTHONPATH=installed)
    (part,) = json.loads(done.stdout)
    assert part["kind"] == "compressor" and part["communicators"] and part["bits_per_element"] == 8
    spec = "by_dims(matrices=blur(block=8) + bounded @ sharded)"
    code = f"import grace_ext; print(grace_ext.grace({spec!r}))"
    whole = "by_dims(matrices=blur(block=8) + bounded(limit=1.0) @ sharded, others=none @ allreduce)"
    assert run([sys.executable, "-c", code], PYTHONPATH=installed).stdout == f"{whole}\n"


def test_the_plugin_passes_the_contracts(installed):
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PLUGIN / "test_plugin.py")], PYTHONPATH=installed)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("name", ["transformers_mnist", "accelerate_mnist", "lightning_mnist", "ray_mnist"])
def test_the_page_of_the_trainers_shows_the_examples(name):
    """The page contains each script, word for word (without its docstring)."""
    code = (ROOT / "examples" / f"{name}.py").read_text().split("from __future__ import annotations\n\n", 1)[1]
    assert f"```python\n{code}```" in (ROOT / "docs" / "trainers.md").read_text()


@pytest.mark.parametrize(
    ("page", "module"),
    [("compressor", "blur"), ("memory", "bounded"), ("communicator", "sharded"), ("policy", "by_dims"), ("transport", "files")],
)
def test_the_extending_pages_show_the_plugin(page, module):
    """Each page contains the code of its example, word for word (without the file's own docstring)."""
    text = (ROOT / "docs" / "extending" / f"{page}.md").read_text()
    docstring, code = (PLUGIN / f"grace_ext_{module}.py").read_text().split('"""\n\n', 1)
    assert docstring.startswith('"""') and f"```python\n{code}```" in text
