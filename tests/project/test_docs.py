"""What is generated is up to date, and the plugin of docs/extending.md is found by its name and keeps the contract."""

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
    """Each with its title, paragraph, command and rows, in the page's order; --check sees a change of one cell."""
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
    """Every part is named in the README's table, and their numbers are right."""
    import grace_ext

    text = (ROOT / "README.md").read_text()
    counts = [len(module.names()) for module in (grace_ext.compressors, grace_ext.memories, grace_ext.communicators)]
    assert [int(n) for n in re.search(r"The shelf: (\d+) compressors, (\d+) memories and (\d+) communicators", text).groups()] == counts
    for module in (grace_ext.compressors, grace_ext.memories, grace_ext.communicators):
        for name in module.names():
            assert name in ("none", "pipeline") or re.search(rf"`{name}[`(]", text), name


def test_links_of_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> str:
    """The plugin, installed as users would, in a folder of its own; from a copy, because installing leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("plugin")
    copy = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("source") / "plugin")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(folder), str(copy)]
    done = run(command)
    assert done.returncode == 0, done.stderr
    return f"{folder}{os.pathsep}{ROOT}"


def test_the_plugin_is_found_by_its_entry_point(installed):
    done = run([sys.executable, "-m", "grace_ext", "show", "blur", "--json"], PYTHONPATH=installed)
    (part,) = json.loads(done.stdout)
    assert part["kind"] == "compressor" and part["communicators"] and part["bits_per_element"] == 8
    code = "import grace_ext; print(grace_ext.grace('blur(block=8) + residual'))"
    assert run([sys.executable, "-c", code], PYTHONPATH=installed).stdout == "blur(block=8) + residual @ allreduce\n"


def test_the_plugin_keeps_the_contract(installed):
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PLUGIN / "test_blur.py")], PYTHONPATH=installed)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


def test_the_extending_page_shows_the_plugin():
    """The code on the page is the code of the file."""
    page = (ROOT / "docs" / "extending.md").read_text()
    source = (PLUGIN / "grace_ext_blur.py").read_text()
    for line in source[source.index("    def fields") :].splitlines():
        assert line.split("#")[0].strip() in page, line
