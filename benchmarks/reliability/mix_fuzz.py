"""Runs random mixes of parts, and checks what must be true of every mix: a fuzzer for where parts meet.

    python benchmarks/reliability/mix_fuzz.py                          100,000 cases; writes benchmarks/results/reliability/mixes.json
    python benchmarks/reliability/mix_fuzz.py --cases 2000 --seed 7    the cases of seeds 7 to 2006; writes nothing
    python benchmarks/reliability/mix_fuzz.py --case 4711              one case again, and what it is
    python benchmarks/reliability/mix_fuzz.py --real                   1,000 cases on each real engine; writes mixes_real.json
    python benchmarks/reliability/mix_fuzz.py --real ddp --cases 50    50 cases on one engine; writes nothing

A case is drawn from its seed (mix_draw.py): a spec over all registered parts, with policies up to three deep; a model; gradients, some of
them not finite; 1 to 8 ranks; a save and load; and another path that must give the same bits (numpy without kernels, torch, device
operations, TensorFlow, in place, with metrics, in small buckets). mix_check.py has what is checked. A case that fails is made smaller
(mix_shrink.py) and printed as Python to paste. Specs that are refused when they are composed are drawn again, and counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record  # noqa: E402
from benchmarks.reliability import mix_real  # noqa: E402
from benchmarks.reliability.mix_case import quiet  # noqa: E402
from benchmarks.reliability.mix_draw import PATHS, a_case  # noqa: E402
from benchmarks.reliability.mix_shrink import Failure, failure, shrunk  # noqa: E402

#: Seconds that one case may take, and cases that a process runs before it reports.
SECONDS, BATCH = 300, 100
PASTE = """from math import inf, nan
from benchmarks.reliability.mix_case import Bad, Case, Tensor
from benchmarks.reliability.mix_shrink import failure
print(failure({!r}))
"""


class TooLong(Exception):
    """A case takes more than SECONDS."""


def prepare() -> None:
    """Prepares a process, which may spend SECONDS on a case."""
    quiet()

    def ring(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, ring)


def batch(seeds: range, paths: dict[str, int], until: float) -> tuple[Counter[str], list[tuple[int, Failure]]]:
    """Runs the cases of these seeds, and starts none after the time `until`. Returns the counts, and the failures with their seeds."""
    tally: Counter[str] = Counter()
    failed = []
    for seed in seeds:
        if time.time() > until:
            break
        signal.alarm(SECONDS)
        try:
            found = failure(a_case(seed, tally, paths), tally)
        finally:
            signal.alarm(0)
        tally["cases"] += 1
        if found:
            failed.append((seed, found))
    return tally, failed


def batches(seeds: range, jobs: int, paths: dict[str, int], until: float) -> Iterator[tuple[Counter[str], list[tuple[int, Failure]]]]:
    """Runs all cases in this many processes."""
    parts = [seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH)]
    if jobs == 1:
        yield from (batch(part, paths, until) for part in parts)
        return
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawned, initializer=prepare) as pool:
        for done in as_completed([pool.submit(batch, part, paths, until) for part in parts]):
            yield done.result()


def explain(seed: int, found: Failure) -> str:
    """Returns a failure as text: what is wrong, and Python that shows it."""
    return f"seed {seed}: {found.text}\n{PASTE.format(found.case)}"


def run(
    seeds: range, jobs: int, paths: dict[str, int], until: float = float("inf")
) -> tuple[Counter[str], dict[str, tuple[int, int, Failure]]]:
    """Runs the cases with a bar, until this time. Returns the counts, and by kind of failure: how often, the first seed and its failure."""
    tally: Counter[str] = Counter()
    kinds: dict[str, tuple[int, int, Failure]] = {}
    for counts, failed in batches(seeds, jobs, paths, until):
        tally.update(counts)
        for seed, found in failed:
            if found.kind not in kinds:
                print(f"\nseed {seed}: {found.text}", file=sys.stderr, flush=True)
            often, first, earlier = kinds.get(found.kind, (0, seed, found))
            kinds[found.kind] = (often + 1, first, earlier)
        if sys.stderr.isatty():
            done = tally["cases"] / len(seeds)
            bad = sum(often for often, _, _ in kinds.values())
            bar = f"\r  [{'#' * int(40 * done):<40}] {tally['cases']:,} of {len(seeds):,}, {bad} failed"
            print(bar, end="", file=sys.stderr, flush=True)
    return tally, kinds


def written(counts: dict[str, int], failed: dict[str, int], seeds: list[list[int]], seconds: float) -> None:
    """Writes the table of docs/reliability.md. seeds: [first, last] of each run; counts and failures are those of all of them."""
    rows = sorted(set(counts) - {"cases", "refused", "compositions"} | set(failed))
    ran = "seeds " + ", ".join(f"{first} to {last}" for first, last in seeds)
    record.reliability("mixes", {
        "title": "Random mixes of parts",
        "text": f"{counts['cases']:,} cases, {ran}, in {seconds / 60:.0f} minutes of processes. Each has a random spec over all parts, "
        "knobs, communicators and policies (up to three deep), 1 to 5 tensors of odd shapes, names and dtypes, gradients that are normal, "
        "sparse, zero, constant, tiny, huge or not finite, 1 to 8 ranks on one or more nodes, 2 to 4 steps, a save and load before one of "
        "them, and one other path. "
        f"{counts['compositions']:,} compositions were drawn that fit; {counts['refused']:,} compositions, knobs and policies were refused "
        "when they were composed, which is a legal outcome, and drawn again. The table has how often each property was checked, and in "
        "how many cases it did not hold, or an error was raised. 'path' compares results and states bit for bit with the same run by "
        "compiled kernels; 'conservation' compares the mean of gradients and residuals with the result and the mean of the new residuals; "
        "'long' are cases of 300 steps.",
        "columns": ["property", "checks", "cases that failed"],
        "rows": [[name, counts.get(name, 0), failed.get(name, 0)] for name in rows],
        "commands": ["python benchmarks/reliability/mix_fuzz.py"],
        "counts": counts, "failed": failed, "seeds": seeds, "seconds": seconds,
    })  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, help="100,000 by default, or 1,000 for each real engine")
    parser.add_argument("--seed", type=int, default=0, help="the first case's seed")
    parser.add_argument("--jobs", type=int, default=record.cores())
    parser.add_argument("--case", type=int, metavar="SEED", help="run one case and print it")
    parser.add_argument("--real", nargs="*", choices=mix_real.ENGINES, metavar="ENGINE", help="cases on these engines, by default on all")
    parser.add_argument("--paths", nargs="+", choices=[path for path in PATHS if path], help="only these paths")
    parser.add_argument("--seconds", type=float, default=30, help="time for making each kind of failure smaller; 0 does not")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after this time; needs --jobs 1")
    parser.add_argument("--merge", action="store_true", help="add the counts to those that were written earlier")
    parser.add_argument("--write", action="store_true", help="write the results, as if there were that many cases")
    options = parser.parse_args()
    if options.minutes < float("inf") and options.jobs > 1:
        parser.error("--minutes needs --jobs 1, so that the seeds that were run are a range")
    prepare()
    paths = {path: PATHS[path] for path in options.paths} if options.paths else PATHS
    if options.case is not None:
        case = a_case(options.case, Counter(), paths)
        found = failure(case)
        print(explain(options.case, shrunk(found, options.seconds)) if found else f"holds: {case}")
        return int(found is not None)
    many = 100_000 if options.real is None else 1_000
    seeds = range(options.seed, options.seed + (options.cases or many))
    write = options.write or len(seeds) >= many
    if options.real is not None:
        return mix_real.main(options.real or list(mix_real.ENGINES), seeds, write)
    print(f"seeds {seeds.start} to {seeds.stop - 1}", file=sys.stderr)
    begun = time.monotonic()
    tally, kinds = run(seeds, options.jobs, paths, time.time() + 60 * options.minutes)
    seconds = time.monotonic() - begun
    each = 1e3 * seconds * options.jobs / max(1, tally["cases"])
    print(f"\n{tally['cases']:,} cases in {seconds:.0f} s, {each:.1f} ms each", file=sys.stderr)
    for kind, count in sorted(tally.items()):
        print(f"  {kind}: {count:,}", file=sys.stderr)
    for kind, (often, seed, found) in sorted(kinds.items()):
        print(f"\n--- {kind}: {often} cases, the first is", explain(seed, shrunk(found, options.seconds)), flush=True)
    if write:
        failed = Counter({kind: often for kind, (often, _, _) in kinds.items()})
        ranges, spent = [[seeds.start, seeds.start + tally["cases"] - 1]], seconds * options.jobs
        if options.merge:
            earlier = record.reliability_table("mixes")
            tally.update(earlier.get("counts", {}))
            failed.update(earlier.get("failed", {}))
            ranges, spent = sorted(earlier.get("seeds", []) + ranges), spent + earlier.get("seconds", 0.0)
        written(dict(tally), dict(failed), ranges, spent)
    return int(bool(kinds))


if __name__ == "__main__":
    sys.exit(main())
