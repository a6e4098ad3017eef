"""Compares the performance targets with the benchmarks' JSON, as rows for docs/performance.md."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

#: Upper bounds in multiples of a memory copy: (encoding with error feedback, decoding per rank), or (all together, None).
LOCAL: dict[str, tuple[float, float | None]] = {
    "threshold": (3, 1), "topk": (5, 1), "randomk": (3, 1), "dgc": (4, 1), "sidco": (4, 1), "fp16": (4, 2), "bf16": (4, 2),
    "signsgd": (4, 2), "efsignsgd": (4, 2), "onebit": (4, 2), "terngrad": (6, 3), "natural": (6, 3), "qsgd(bits=8)": (6, 3),
    "u8bit": (6, 3), "powersgd(rank=4) + residual": (14, None),
}  # fmt: skip
#: Upper bounds of the time relative to dense Horovod in the same cell.
RELATIVE = {
    "resnet50/1gbit/2": {
        "threshold": 0.10, "topk": 0.12, "randomk": 0.10, "signsgd": 0.15, "efsignsgd": 0.15, "onebit": 0.15, "terngrad": 0.20,
        "qsgd 4-bit": 0.28, "qsgd 8-bit": 0.42, "fp16": 0.58, "powersgd": 0.20, "none": 1.03,
    },
    "resnet50/100mbit/2": {"threshold": 0.035, "topk": 0.035, "signsgd": 0.055, "efsignsgd": 0.055, "onebit": 0.055},
}  # fmt: skip
#: Lower bounds of the speed-up over GRACE's compressor of that name, in the first of these cells.
FASTER_THAN_GRACE = {name: 15.0 for name in ("topk", "threshold", "randomk", "terngrad")}
DDP_HOOKS = ("DDP hook powersgd, one bucket", "DDP powerSGD hook, rank 4, one bucket", 0.45)
TENSORFLOW = 2.0
SAME_ACCURACY = 8.0


class Row(NamedTuple):
    """Compares one ratio with its target. most: whether the target is an upper bound. measured: None if one of the two systems failed."""

    where: str
    what: str
    target: float
    most: bool
    measured: float | None

    @property
    def met(self) -> bool:
        return self.measured is not None and (self.measured <= self.target if self.most else self.measured >= self.target)


def of_local(rows: list[dict[str, Any]]) -> list[Row]:
    """Returns the rows for local.py."""
    made = []
    for row in rows:
        if row["asked"] in LOCAL:
            encode, decode = LOCAL[row["asked"]]
            where = f"{row['elements']:,} elements"
            what = "encode" if decode else "all"
            made.append(Row(where, f"{row['asked']}: {what} / copy", encode, True, row["encode"]))
            if decode:
                made.append(Row(where, f"{row['asked']}: decode per rank / copy", decode, True, row["decode"]))
    return made


def of_exchange(results: dict[str, Any]) -> list[Row]:
    """Returns the rows for exchange.py, for the cells that were measured."""
    rows = []
    for key, targets in RELATIVE.items():
        cell = _cell(results, key)
        if cell:
            dense = statistics.mean(cell["dense_ms"]) if cell["dense_ms"] else None
            tried = {name: most for name, most in targets.items() if name in cell["systems"]}
            rows += [Row(key, f"{name} / dense Horovod", most, True, _ratio(_ms(cell, name), dense)) for name, most in tried.items()]
    key = next(iter(RELATIVE))
    cell = _cell(results, key)
    if cell:
        for name, least in FASTER_THAN_GRACE.items():
            if name in cell["systems"] and f"GRACE {name}" in cell["systems"]:
                rows.append(Row(key, f"GRACE {name} / {name}", least, False, _ratio(_ms(cell, f"GRACE {name}"), _ms(cell, name))))
        ours, theirs, most = DDP_HOOKS
        if ours in cell["systems"] and theirs in cell["systems"]:
            rows.append(Row(key, f"{ours} / {theirs}", most, True, _ratio(_ms(cell, ours), _ms(cell, theirs))))
    rows += _tensorflow(results)
    return rows


def _tensorflow(results: dict[str, Any]) -> list[Row]:
    """Returns the rows that compare TensorFlow with torch, for every cell that has both."""
    rows = []
    for key, cell in results["cells"].items():
        for name in cell["systems"] if cell["complete"] and cell["model"] == "resnet50" else ():
            plain = name.removeprefix("TensorFlow ")
            if plain != name and plain != "Horovod":
                rows.append(Row(key, f"{name} / {plain}", TENSORFLOW, True, _ratio(_ms(cell, name), _ms(cell, plain))))
    return rows


def of_accuracy(rows: list[dict[str, Any]]) -> list[Row]:
    """Returns the rows for time_to_accuracy.py: per task, the fastest compressor."""
    made = []
    for task in dict.fromkeys(row["task"] for row in rows):
        times = speedups([row for row in rows if row["task"] == task])
        best = max((x for x in times.values() if x is not None), default=None)
        made.append(Row(task, "dense / the fastest compressor, seconds to the same accuracy", SAME_ACCURACY, False, best))
    return made


def speedups(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Returns for one task, by spec, dense seconds / seconds to the target, the mean over the seeds that both have; None if a run did not
    reach it."""
    at = {(row["spec"], row["seed"]): row for row in rows}
    found: dict[str, float | None] = {}
    for spec in dict.fromkeys(row["spec"] for row in rows if row["spec"] != "dense"):
        pairs = [(at["dense", seed], row) for (s, seed), row in at.items() if s == spec and ("dense", seed) in at]
        reached = pairs and all(dense["reached"] and row["reached"] for dense, row in pairs)
        found[spec] = statistics.mean(dense["seconds"] / row["seconds"] for dense, row in pairs) if reached else None
    return found


def _cell(results: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Returns the complete cell of that model, rate and number of hosts, from a run with torch alone or with both frameworks."""
    found = [results["cells"].get(name) for name in (key, f"{key}/both")]
    return next((cell for cell in found if cell and cell["complete"]), None)


def _ms(cell: dict[str, Any], name: str) -> float | None:
    seen = cell["systems"].get(name)
    return seen["ms"] if seen and seen["outcome"] == "completes" else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
