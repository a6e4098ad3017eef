#!/usr/bin/env python3
"""Times encoding and decoding of every compressor on one rank, at the settings of benchmarks/common/settings.py, in multiples of a memory
copy: `grace-ext bench` with machine and date.

    python benchmarks/exchange/local.py [--elements N] [--times N] [--out benchmarks/results/bench.json]

Takes about ten minutes. `tools/performance.py` makes a table of the results, with the targets beside them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from grace_ext.planning.candidates import completed

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record, settings
from benchmarks.common.targets import LOCAL

RESULTS = Path(__file__).parents[1] / "results" / "bench.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--times", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    known = {str(completed(text)) for text in LOCAL}
    asked = [*LOCAL, *(text for texts in settings.SETTINGS.values() for text in texts if str(completed(text)) not in known)]
    sizes = ["--elements", str(options.elements), "--times", str(options.times)]
    command = [sys.executable, "-m", "grace_ext", "bench", *asked, *sizes, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = json.loads(done.stdout)["rows"]
    for text, row in zip(asked, rows, strict=True):
        row["asked"] = text
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**record.stamp(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
