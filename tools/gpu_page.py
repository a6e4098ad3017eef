"""Writes the tables of docs/gpu.md: what a step costs on a device, from tests/arrays/device_budgets.json, and the least that it could move.

    python tools/gpu_page.py             writes the tables into the page
    python tools/gpu_page.py --check     exits with 1 if the page has others

tools/device_budgets.py starts it when it has written new numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, BUDGETS = ROOT / "docs" / "gpu.md", ROOT / "tests" / "arrays" / "device_budgets.json"
#: By compressor: bytes per element that one pass per bucket has to move, as a number and a share for each rank, and what of.
LEAST = {
    "efsignsgd + residual": (
        24.0, 1 / 8, "gradient and residual read, their sum written; the sum read, residual and result written; a bit of each rank"
    ),
    "threshold, or sampled top-k": (
        20.0, 0.0, "gradient and residual read, their sum written; the sum read for the positions; the result written"
    ),
    "topk, exact (radix)": (32.0, 0.0, "the same, and the sum read three more times for the k-th largest"),
    "qsgd, 4 bits": (8.5, 1 / 2, "gradient read, codes and result written; half a byte of each rank"),
    "powersgd, rank 4": (
        32.0, 0.0, "gradient and residual read, their sum written; the sum read three times; residual and result written"
    ),
}  # fmt: skip
#: Bytes per second that copies in the memory of two GPUs should reach.
REACHED = {"H200": 4.3e12, "A100": 1.7e12}
BUCKET, RANKS = 25 << 20, 8


def costs() -> list[str]:
    """Returns the table of counts on the pretended device."""
    lines = [
        "| spec | launches: one tensor | 20 tensors | waits: one tensor | 20 tensors | copies: 20 tensors | bytes per element |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for spec, buckets in json.loads(BUDGETS.read_text()).items():
        one, many = buckets["one tensor"], buckets["20 tensors"]
        copies = many["uploads"] + many["downloads"]
        numbers = (one["launches"], many["launches"], one["waits"], many["waits"], copies, one["bytes"])
        lines.append(f"| `{spec}` | {' | '.join(f'{number:,g}' for number in numbers)} |")
    return lines


def rooflines() -> list[str]:
    """Returns the table of the least bytes, and how long a bucket takes at the rate of a memory."""
    elements = BUCKET / 4
    lines = [f"| | bytes per element, n ranks | {' | '.join(f'{name}, us' for name in REACHED)} | what is moved |", "|---|---|--:|--:|---|"]
    for name, (fixed, per_rank, what) in LEAST.items():
        formula = f"{fixed:g}" + (f" + n/{1 / per_rank:g}" if per_rank else "")
        times = (f"{1e6 * elements * (fixed + per_rank * RANKS) / rate:.0f}" for rate in REACHED.values())
        lines.append(f"| {name} | {formula} | {' | '.join(times)} | {what} |")
    return lines


def page(text: str) -> str:
    """Returns the page with both tables between their marks."""
    for name, lines in (("costs", costs()), ("rooflines", rooflines())):
        begin, end = f"<!-- {name}: written by tools/gpu_page.py -->\n", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{PAGE.name} has no lines {begin.strip()!r} and {end!r}, between which the table goes: put them back")
        before, rest = text.split(begin)
        text = before + begin + "\n".join([*lines, end]) + rest.split(end)[1]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    text = PAGE.read_text()
    made = page(text)
    if not parser.parse_args().check:
        PAGE.write_text(made)
    elif made != text:
        print("docs/gpu.md differs from tests/arrays/device_budgets.json: run python tools/gpu_page.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
