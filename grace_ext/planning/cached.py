"""Keeps recorded traces in the user's cache folder, under a key of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from ..arrays import kernels
from ..composition.grace import Grace
from .bench import machine
from .shapes import Shapes, specs_of
from .trace import CPU, Event, Taken, Trace, record


def traces(chosen: dict[str, Grace], shapes: Shapes, *, fresh: bool, tell: Callable[[str], None] = lambda text: None) -> dict[str, Trace]:
    """Returns each candidate's trace on this machine: the cached one, if this version recorded one, unless `fresh`; else a new one."""
    made = {}
    for text, g in chosen.items():
        tell(text)
        file = kernels.cache_folder() / "traces" / f"{_key(g, shapes)}.json"
        made[text] = (None if fresh else _load(file)) or _kept(file, record(g, shapes, clock=CPU))
    return made


def _key(g: Grace, shapes: Shapes) -> str:
    """Hashes everything that a trace depends on: machine, versions, this package's code, the composition and the shapes."""
    digest = hashlib.sha256(json.dumps([machine(), str(g), g.seed, [asdict(spec) for spec in specs_of(shapes)]]).encode())
    for file in sorted(Path(str(files("grace_ext"))).rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _load(file: Path) -> Trace | None:
    try:
        saved = json.loads(file.read_text())
        alone, pair = (tuple(Event(**event) for event in saved[which]) for which in ("alone", "pair"))
        taken, shards = Taken(**saved["taken"]), tuple(saved["shards"])
        return Trace(alone, pair, saved["dense"], saved["two_level"], saved["piece"], taken, shards)
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or a damaged one
        return None


def _kept(file: Path, trace: Trace) -> Trace:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(trace)))
        fresh.replace(file)
    except OSError:  # the cache cannot be written: the trace is recorded again next time
        pass
    return trace
