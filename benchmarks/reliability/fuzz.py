"""Feeds damaged and hostile messages to every decoder. Counts what was refused, what was accepted, and what must never happen.

    python benchmarks/reliability/fuzz.py                      a million inputs; writes benchmarks/results/reliability/fuzz.json
    python benchmarks/reliability/fuzz.py --inputs 20000       fewer inputs
    python benchmarks/reliability/fuzz.py --parts coverage     only these parts
    python benchmarks/reliability/fuzz.py --merge              keeps the earlier rows of parts that are not run

Each part runs in its own process with a memory limit (a huge allocation raises MemoryError), a time limit per input (an input that exceeds
it is a hang), and faulthandler (a crash of the process is counted, and ends the part):
    compiled      every composition and every other decoder, by the compiled kernels that training uses
    checked       the same, by kernels that are compiled with bounds checks, in their own cache folder
    plain         the same, by numpy operations
    torch         exchanges by torch operations, as on another device
    coverage      exchanges and other decoders by numpy, by a coverage-guided fuzzer (atheris)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record

ROOT = Path(__file__).parents[2]
#: Each part's share of the inputs.
PARTS = {"compiled": 0.4, "checked": 0.2, "plain": 0.25, "torch": 0.05, "coverage": 0.1}
#: Limits: bytes beyond those of the process at its start, and seconds per input.
BYTES, SECONDS = 1 << 30, 60
#: How many inputs one target gets in a row, and the seconds that they may take.
BATCH, BATCH_SECONDS = 50, 0.1


class Hang(BaseException):
    """Raised in an input that takes too long."""


def targets(part: str) -> list[Any]:
    """Makes the part's targets, which takes long while kernels are not compiled yet."""
    from tests import catalog
    from tests.fuzz.decoders import others
    from tests.fuzz.exchanges import LARGE, ExchangeTarget

    ops = library(part)
    made = [] if part == "torch" else others(ops)
    specs = list(dict.fromkeys(catalog.NATURAL + catalog.MIXES))
    if part in ("torch", "coverage"):
        specs = [spec for spec in catalog.PLAIN if "(" not in spec]
    made += [ExchangeTarget(ops, spec) for spec in specs]
    if part in ("compiled", "checked"):
        made += [ExchangeTarget(ops, spec, LARGE) for spec in catalog.PLAIN if "(" not in spec]
    return made


def library(part: str) -> Any:
    if part == "torch":
        from grace_ext.frameworks.torch.ops import TorchOps

        return TorchOps("cpu")
    from grace_ext.arrays.compiled import host_ops
    from grace_ext.arrays.numpy import NumpyOps

    return NumpyOps() if part in ("plain", "coverage") else host_ops(NumpyOps)


class Counts:
    """Counts the outcomes of a part's inputs; written to a file regularly, so that a crash loses little."""

    def __init__(self, file: Path, total: int):
        self.file, self.total = file, total
        self.seen = {"inputs": 0, "refused": 0, "accepted": 0, "hangs": 0, "allocations": 0, "other": 0, "seconds": 0.0}
        self.failures: dict[str, list[Any]] = {}
        self._begun = time.monotonic()

    def feed(self, target: Any, slot: int, data: bytes) -> None:
        self.seen["inputs"] += 1
        signal.alarm(SECONDS)
        try:
            self.seen[target.feed(slot, data)] += 1
        except Hang:
            self._failed("hangs", target, slot, data)
        except MemoryError:
            self._failed("allocations", target, slot, data)
        except Exception:
            self._failed("other", target, slot, data)
        finally:
            signal.alarm(0)

    def _failed(self, kind: str, target: Any, slot: int, data: bytes) -> None:
        self.seen[kind] += 1
        where = traceback.format_exc().strip().splitlines()
        self.failures.setdefault(where[-1][:200], [target.name, slot, data.hex()[:4000], where[-8:]])

    def write(self) -> None:
        self.seen["seconds"] = time.monotonic() - self._begun
        beside = self.file.with_suffix(".new")  # a crash must not leave half a file
        beside.write_text(json.dumps({**self.seen, "failures": self.failures}))
        beside.replace(self.file)
        if sys.stderr.isatty():
            done = self.seen["inputs"] / max(1, self.total)
            print(f"\r  [{'#' * int(40 * done):<40}] {self.seen['inputs']:,} of {self.total:,}", end="", file=sys.stderr, flush=True)


def limited() -> None:
    """Sets this process's memory limit, and the handler of its time limit."""

    def ring(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))


def work(part: str, count: int, file: Path, seed: int) -> None:
    """Runs one part in this process."""
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    if part == "coverage":
        return guided(count, file, seed)
    chosen, counts = targets(part), Counts(file, count)
    streams = [target.inputs(random.Random(f"{seed} {part} {i} {target.name}")) for i, target in enumerate(chosen)]
    limited()
    order, turn = random.Random(seed), 0
    numbers = list(range(len(chosen)))
    while counts.seen["inputs"] < count:
        if turn % len(numbers) == 0:
            order.shuffle(numbers)  # every target gets as many turns
        number, until, turn = numbers[turn % len(numbers)], time.monotonic() + BATCH_SECONDS, turn + 1
        for _ in range(min(BATCH, count - counts.seen["inputs"])):
            counts.feed(chosen[number], *next(streams[number]))
            if time.monotonic() > until:  # targets with large tensors or solvers are slow
                break
        counts.write()
    return None


def guided(count: int, file: Path, seed: int) -> None:
    """Runs atheris (libFuzzer), which mutates inputs that reached a new branch. The first two bytes of an input choose target and slot; the
    rest is the message."""
    import atheris

    with atheris.instrument_imports(include=["grace_ext"]):
        import grace_ext.driver.driver  # noqa: F401

        chosen = targets("coverage")
    counts = Counts(file, count)
    corpus = Path(tempfile.mkdtemp(prefix="grace_ext-corpus-"))
    for number, target in enumerate(chosen):
        honest = [slot.honest for slot in target.slots] if hasattr(target, "slots") else target.honest
        for slot, data in enumerate(honest):
            (corpus / f"{number}-{slot}").write_bytes(bytes([number % 256, slot % 256]) + data)
    limited()

    def one(data: bytes) -> None:
        if len(data) >= 2 and counts.seen["inputs"] < count:
            target = chosen[data[0] % len(chosen)]
            slots = len(getattr(target, "slots", None) or target.honest)
            counts.feed(target, data[1] % slots, data[2:])
            if counts.seen["inputs"] % 500 == 0 or counts.seen["inputs"] == count:
                counts.write()

    atheris.Setup([sys.argv[0], f"-runs={count + count // 20}", f"-seed={seed + 1}", "-max_len=4096", "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()


def run(part: str, count: int, seed: int) -> dict[str, Any]:
    """Runs one part in its own process; if that process dies, it is a crash."""
    print(part, file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "counts.json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        if part == "checked":
            environment |= {"NUMBA_BOUNDSCHECK": "1", "GRACE_EXT_CACHE": str(Path(folder, "kernels"))}
        if part == "coverage":  # numba cannot compile the instrumented functions
            environment["GRACE_EXT_KERNELS"] = "0"
        command = [sys.executable, __file__, "--work", part, "--inputs", str(count), "--seed", str(seed), "--file", str(file)]
        done = subprocess.run(["nice", "-n", "19", *command], env=environment)
        print(file=sys.stderr)
        seen = json.loads(file.read_text()) if file.exists() else {}
        return {"part": part, **seen, "crashes": int(done.returncode != 0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--merge", action="store_true", help="keep the earlier rows of parts that are not run")
    parser.add_argument("--work", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.inputs, options.file, options.seed)
        return 0
    kinds = ["inputs", "refused", "accepted", "crashes", "hangs", "allocations", "other"]
    rows, failed = [], False
    for part in options.parts:
        seen = run(part, int(options.inputs * PARTS[part]), options.seed)
        rows.append([part, *(seen.get(kind, 0) for kind in kinds), round(seen.get("seconds", 0.0))])
        failed |= any(rows[-1][4:8])
        for error, (name, slot, data, where) in seen.get("failures", {}).items():
            print(f"{part}: {name}, slot {slot}: {error}\n  {data}\n  " + "\n  ".join(where), file=sys.stderr)
    if options.merge:
        rows += [row for row in record.reliability_rows("fuzz") if row[0] not in (*options.parts, "all")]
        rows.sort(key=lambda row: list(PARTS).index(row[0]))
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, len(kinds) + 2))])
    record.reliability("fuzz", {
        "title": "Hostile and damaged payloads",
        "text": "Valid messages are damaged (bits, counts, positions, scales that are NaN or infinite, lengths, headers, moved pieces, "
        "noise) and fed to every mix of compressor, memory and communicator, and to every other decoder. Refused: a PayloadError names "
        "the peer and, if the damage is in one parameter's payload, the parameter. Accepted: the result has the right shape and type, and "
        "no NaN that is not flagged (damage that gives another valid value cannot be detected). The other columns must be 0; they count "
        f"that the process died; an input took over {SECONDS} s; an input took over {BYTES >> 30} GiB; another error, or a wrong result. "
        "'checked' are kernels with bounds checks; 'coverage' is a coverage-guided fuzzer.",
        "columns": ["decoders", *kinds, "seconds"], "rows": rows, "commands": ["python benchmarks/reliability/fuzz.py"],
    })  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
