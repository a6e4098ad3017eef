"""Scaling curves from the simulator: how long an exchange takes for 2 to 4,096 workers, dense by several algorithms and compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import simulate
from .cost import Link
from .errors import ParameterError, UnsupportedError
from .plan import Advice, Model
from .trace import Event, replay

WORKERS = tuple(2**i for i in range(1, 13))


def simulated(model: Model, spec: str, link: Link, n: int, algorithm: str | None = None) -> float:
    """Seconds of one exchange of n workers, each collective played out message by message; all-reduces by `algorithm` (by default a
    ring)."""
    ways = {"allreduce": algorithm or "ring", "allgather": "all-gather", "alltoall": "all-to-all"}
    # A ring's and a gather's time is linear in the bytes: two sizes tell all, and thousands of workers are played out only twice a kind.
    lines: dict[str, tuple[float, float]] = {}

    def network(kind: str, n: int, nbytes: float) -> float:
        if kind == "broadcast":
            return n * simulate.seconds("broadcast", n, link, nbytes)
        if kind not in lines:
            start, large = (simulate.seconds(ways[kind], n, link, size) for size in (0.0, 1e6))
            lines[kind] = start, (large - start) / 1e6
        start, each = lines[kind]
        return start + each * nbytes

    return replay(model.traces[spec].on(n), network, n).exchange


def two_level(model: Model, link: Link, n: int, per_node: int) -> float:
    """Seconds of the dense exchange in two levels, work included."""
    dense = next(iter(model.traces.values()))
    work = sum(event.work for event in dense.on(n) if isinstance(event, Event))
    return work + simulate.seconds("two-level sum", n, link, dense.dense, per_node=per_node, inside=model.inside, dense=dense.dense)


def curves(model: Model, link: Link, advice: Advice, workers: tuple[int, ...] = WORKERS) -> dict[str, dict[int, float]]:
    """Seconds by number of workers, by curve: dense by ring, tree, halving-doubling and in two levels, and every candidate."""
    dense, per_node = next(iter(model.traces)), max(2, model.per_node)
    made: dict[str, Any] = {
        f"dense, {name}": {n: simulated(model, dense, link, n, name) for n in workers} for name in ("ring", "tree", "halving-doubling")
    }
    made[f"dense, two-level ({per_node} a node)"] = {
        n: two_level(model, link, n, per_node) for n in workers if n % per_node == 0 and n > per_node
    }
    for spec in model.traces:
        if spec != dense:
            made[spec] = {n: simulated(model, spec, link, n) for n in workers}
    return made


def draw(model: Model, link: Link, advice: Advice, file: Path) -> None:
    """Writes the picture; its format is that of the file's name. Raises UnsupportedError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError("--picture needs matplotlib: pip install 'grace_ext[examples]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, points in curves(model, link, advice).items():
        line = "--" if name.startswith("dense") else "-"
        axes.loglog(list(points), [1000 * s for s in points.values()], line, label=name, linewidth=2.5 if name == advice.spec else 1.2)
    title = f"a link of {link.rate / 1e6:.4g} Mbit/s, {1e6 * link.latency:.3g} us a message"
    axes.set(xlabel="workers", ylabel="exchange, ms", title=title)
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="small")
    axes.grid(True, alpha=0.3)
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise ParameterError(f"cannot write the picture {str(file)!r}: {error}") from None
    finally:
        plt.close(figure)
