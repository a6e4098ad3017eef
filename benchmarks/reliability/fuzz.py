"""Damaged and hostile messages into every decoder: counts of what was refused, accepted, and of what must never happen.

    python benchmarks/reliability/fuzz.py                      a million inputs; writes benchmarks/results/reliability/fuzz.json
    python benchmarks/reliability/fuzz.py --inputs 20000       fewer
    python benchmarks/reliability/fuzz.py --parts coverage     some of the parts
    python benchmarks/reliability/fuzz.py --merge              keeps the rows of parts that are not run

Each part is a process of its own, with a limit on its memory (so that a huge allocation is a MemoryError), a time limit for each input (a
hang), and faults reported (a crash of the process is counted, and ends the part):
    compiled      every mix of parts and every other decoder, by the kernels as they run in training
    checked       the same, by kernels that were compiled with bounds checks, in a cache folder of their own
    plain         the same, by numpy operations
    torch         exchanges by torch operations, as on another device
    coverage      a fuzzer that is guided by which branches its inputs reach (atheris), over exchanges and other decoders, by numpy
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
#: Beyond what the process has when it begins; for one input.
BYTES, SECONDS = 1 << 30, 60
#: Inputs of one target in a row, and the seconds that they may take.
BATCH, BATCH_SECONDS = 50, 0.1


class Hang(BaseException):
    """An input took too long."""


def targets(part: str) -> list[Any]:
    """Functions that make them: a target is heavy where kernels are not compiled yet."""
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
    """What came of a part's inputs; written to a file now and then, so that a crash loses little."""

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
        beside = self.file.with_suffix(".new")  # a crash must not leave half of it
        beside.write_text(json.dumps({**self.seen, "failures": self.failures}))
        beside.replace(self.file)
        if sys.stderr.isatty():
            done = self.seen["inputs"] / max(1, self.total)
            print(f"\r  [{'#' * int(40 * done):<40}] {self.seen['inputs']:,} of {self.total:,}", end="", file=sys.stderr, flush=True)


def limited() -> None:
    """This process's limits."""

    def ring(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))


def work(part: str, count: int, file: Path, seed: int) -> None:
    """One part, in this process."""
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
            order.shuffle(numbers)  # each has its turn as often as the others
        number, until, turn = numbers[turn % len(numbers)], time.monotonic() + BATCH_SECONDS, turn + 1
        for _ in range(min(BATCH, count - counts.seen["inputs"])):
            counts.feed(chosen[number], *next(streams[number]))
            if time.monotonic() > until:  # large tensors, and solvers
                break
        counts.write()
    return None


def guided(count: int, file: Path, seed: int) -> None:
    """libFuzzer mutates inputs that reached a new branch: the first two bytes choose the target and the slot, the rest is the message."""
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
    """One part in a process of its own; a death of that process is a crash."""
    print(part, file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "counts.json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        if part == "checked":
            environment |= {"NUMBA_BOUNDSCHECK": "1", "GRACE_EXT_CACHE": str(Path(folder, "kernels"))}
        if part == "coverage":  # its instrumented functions are none that numba can compile
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
    parser.add_argument("--merge", action="store_true", help="keep the rows of the parts that are not run")
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
        "text": "Honest messages, damaged: bits, counts, positions, scales that are NaN or infinite, lengths, headers, pieces moved about, "
        "and noise; fed to every mix of compressor, memory and communicator, and to every other decoder. Refused: a PayloadError that "
        "names the peer, and the parameter where it is one's. Accepted: a result of the right shape and type, without NaN that is not "
        "flagged (a value that is another valid value cannot be told). The other columns must be 0: the process died; an input took "
        f"over {SECONDS} s; it took over {BYTES >> 30} GiB; another error, or a wrong result. 'checked' are kernels with bounds checks, "
        "'coverage' a coverage-guided fuzzer.",
        "columns": ["decoders", *kinds, "seconds"], "rows": rows, "commands": ["python benchmarks/reliability/fuzz.py"],
    })  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
