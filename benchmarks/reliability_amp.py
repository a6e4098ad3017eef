"""Mixed precision in real jobs of 2 ranks: what held. Writes benchmarks/results/reliability/amp.json.

    python benchmarks/reliability_amp.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import record

sys.path.insert(0, str(Path(__file__).parents[1]))
RESULT = Path(__file__).parent / "results" / "reliability" / "amp.json"
TEXT = (
    "Jobs of 2 ranks with torch's GradScaler (by torchrun: the wrapper and the DDP hook; by horovodrun: the wrapper), 16-bit autocast, and "
    "Keras's LossScaleOptimizer. While the scale grows by powers of two, weights and memory must be the bits of training without a "
    "scale; after an Inf on one rank no rank's weights or memory change and all scales are halved alike, for memories of one and of "
    "several arrays."
)
JOBS = (("torchrun", "amp_job.py"), ("horovodrun", "amp_job.py"), ("horovodrun", "amp_tf_job.py"))


def rows() -> list[list[str]]:
    from tests.frameworks.launch import JOBS as FOLDER
    from tests.frameworks.launch import job

    found = []
    for engine, file in JOBS:
        cases = re.findall(r"^def case_(\w+)", (FOLDER / file).read_text(), re.MULTILINE)
        held = set(re.findall(r"CASE case_(\w+) ok", job(engine, 2, file, timeout=1200)))
        test = "test_keras" if "tf" in file else "test_torch"
        for case in cases:
            title = f"{engine}, {'Keras' if 'tf' in file else 'torch'}: {case.replace('_', ' ')}"
            command = f"pytest tests/frameworks/test_amp.py -k '{test} and {case}'"
            found.append([title, "ok" if case in held else "failed", command])
    return found


def main() -> None:
    document = {
        "title": "Mixed precision",
        "machine": record.machine(),
        "text": TEXT,
        "columns": ["case", "outcome", "command"],
        "rows": rows(),
        "commands": ["python benchmarks/reliability_amp.py"],
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["rows"], indent=1))


if __name__ == "__main__":
    main()
