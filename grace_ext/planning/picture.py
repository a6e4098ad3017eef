"""Draws scaling curves from the simulator: the time of an exchange for 2 to 4,096 workers, compressed, and dense by several algorithms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ParameterError, UnsupportedError
from . import simulate
from .cost import Link
from .plan import Model, Recommendation

WORKERS = tuple(2**i for i in range(1, 13))


class Played:
    """Gives the seconds of a collective on the network of OnLink, simulated message by message; all-reduces use `algorithm`."""

    def __init__(self, link: Link, per_node: int, inside: Link, algorithm: str = "ring"):
        self.link, self.per_node, self.inside = link, per_node, inside
        self.ways = {"allreduce": algorithm, "allgather": "all-gather", "alltoall": "all-to-all", "broadcast": "broadcast"}
        # Time is linear in the bytes, so that two simulations per kind give the line, for thousands of workers too.
        self.lines: dict[tuple[str, int], tuple[float, float]] = {}

    def between(self) -> Played:
        return Played(self.link, 1, self.inside, self.ways["allreduce"])

    def __call__(self, kind: str, n: int, nbytes: float) -> float:
        if (kind, n) not in self.lines:
            per_node = min(self.per_node, n)
            start, large = (
                simulate.seconds(self.ways[kind], n, self.link, size, per_node=per_node, inside=self.inside) for size in (0.0, 1e6)
            )
            self.lines[kind, n] = start, (large - start) / 1e6
        start, each = self.lines[kind, n]
        return (n if kind == "broadcast" else 1) * (start + each * nbytes)


def curves(model: Model, link: Link, workers: tuple[int, ...] = WORKERS) -> dict[str, dict[int, float]]:
    """Returns the seconds of one exchange by curve and number of workers: dense by ring, tree, halving-doubling and in two levels, and
    every candidate. Numbers of workers that do not fill their nodes are left out."""
    made: dict[str, dict[int, float]] = {}
    dense = next(iter(model.traces))
    sizes = [n for n in workers if n <= model.per_node or n % model.per_node == 0]
    for algorithm in ("ring", "tree", "halving-doubling"):
        network = Played(link, model.per_node, model.inside, algorithm)
        made[f"dense, {algorithm}"] = {n: model.of(n).timed(dense, network).exchange for n in sizes}
    per_node = max(2, model.per_node)
    traces = {dense: replace(model.traces[dense], two_level=True)}
    levels = Model(traces, model.n, per_node=per_node, inside=model.inside, compute=model.compute, host=model.host)
    network = Played(link, 1, model.inside)
    made[f"dense, two-level ({per_node} per node)"] = {
        n: levels.of(n).timed(dense, network).exchange for n in sizes if n % per_node == 0 and n > per_node
    }
    network = Played(link, model.per_node, model.inside)
    for spec in model.traces:
        if spec != dense:
            made[spec] = {n: model.of(n).timed(spec, network).exchange for n in sizes}
    return made


def titled(model: Model, link: Link, fitted: bool) -> str:
    among = f"{model.per_node} workers per node" if model.per_node > 1 else "one worker per node"
    if fitted:
        among = f"fitted to {model.n} workers, extrapolated for other numbers"
    start = f"{1e6 * link.latency:.4g} us per message, {1e6 * link.overhead:.4g} us per collective"
    start += f"\n{model.host.copied} copied between GPU and host at {model.host.rate / 8e9:.3g} GB/s" if model.host else ""
    return f"{among}:\na link of {link.rate / 1e6:.4g} Mbit/s, {start}"


def draw(model: Model, link: Link, advice: Recommendation, file: Path, *, fitted: bool = False) -> None:
    """Writes the picture in the format of the file's extension. fitted: whether the link was measured among the model's workers. Raises
    UnsupportedError without matplotlib, and ParameterError if the file cannot be written."""
    plt = pyplot("examples")
    figure, axes = plt.subplots(figsize=(11, 5.5), layout="constrained")
    for number, (name, points) in enumerate(curves(model, link).items()):
        look = f"C{number % 10}" + "os^Dv"[number % 5] + ("-", "--", ":")[number // 10 % 3]  # colours repeat after ten
        width = 3 if name == advice.spec else 1.2
        axes.loglog(list(points), [1000 * s for s in points.values()], look, label=name, linewidth=width, markersize=3.5)
    axes.set(xlabel="workers", ylabel="exchange, ms", title=titled(model, link, fitted))
    axes.set_xscale("log", base=2)
    figure.legend(fontsize="small", loc="outside right upper")
    axes.grid(True, alpha=0.3)
    save(figure, file)


def pyplot(extra: str) -> Any:
    """Returns matplotlib.pyplot, which draws into files. Raises UnsupportedError, naming the extra that brings it, if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError(f"--picture needs matplotlib: pip install 'grace_ext[{extra}]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, file: Path) -> None:
    """Writes a figure of matplotlib.pyplot in the format of the file's extension, and closes it. Raises ParameterError if the file cannot
    be written."""
    import matplotlib.pyplot as plt

    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise ParameterError(f"cannot write the picture {str(file)!r}: {error}") from None
    finally:
        plt.close(figure)
