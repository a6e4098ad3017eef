"""Defines `grace-ext privacy`: its options and its output."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..composition.making import grace
from ..errors import ParameterError, UnsupportedError
from ..parts.spec import parse
from ..planning.candidates import completed, completions
from .plan import check_picture, progress

if TYPE_CHECKING:
    from ..attacks.membership import Membership
    from ..attacks.study import Recovered
    from ..attacks.victim import Victim

DENSE = "none"
USUAL = ("topk(ratio=0.1)", "topk(ratio=0.01)", "powersgd(rank=4)", "powersgd(rank=1)", "lqsgd")
#: The names of grace_ext.attacks.inversion, which cannot be imported without torch.
ATTACKS = ("analytic", "dlg", "cosine")
SPECS = "Specs to compare with dense, a compressor without a memory with its natural one; default: topk, powersgd and lqsgd."
MODEL = (
    "lenet, mlp, or module:callable that returns a torch model, (model, loss) or (model, loss, (inputs, targets)). The model maps "
    "\\[batch, ...] to scores \\[batch, classes]. The default loss is the cross-entropy; the default data are MNIST, \\[batch, 1, 28, 28] "
    "from 0 to 1."
)
ATTACK = (
    "analytic (the first layer must be fully connected), cosine (Adam) or dlg (L-BFGS, which is slow and often fails); may be repeated; "
    "default: analytic if it applies, and cosine."
)
STEP = "The step that is attacked, after steps on other batches, with the same weights: error feedback adds to what is sent."
MEMBERSHIP = "Also train on 500 examples with each spec, and with noise, and tell them from others by their losses."
VERDICT = (
    "Compression is not a defence: it lowers what a careless attacker sees. Use differential privacy (--membership shows what it does, "
    "docs/privacy.md how)."
)


def privacy(
    specs: Annotated[list[str] | None, typer.Argument(help=SPECS)] = None,
    model: Annotated[str, typer.Option(help=MODEL)] = "lenet",
    batch: Annotated[int, typer.Option(min=1, help="Examples per gradient. One is the easiest to recover.")] = 1,
    attack: Annotated[list[str] | None, typer.Option(help=ATTACK)] = None,
    step: Annotated[int, typer.Option(min=1, help=STEP)] = 1,
    images: Annotated[int, typer.Option(min=1, help="Number of examples to recover, rounded up to whole batches.")] = 4,
    membership: Annotated[bool, typer.Option("--membership", help=MEMBERSHIP)] = False,
    picture: Annotated[Path | None, typer.Option(help="File to draw original and recovered images to (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Shows what an observer of one rank's messages recovers of its data: it attacks the payloads that compressed gradients travel in.

    A naive attacker takes what payloads decode to for the gradient; an adaptive one knows the compressor, and compares only what was sent.
    Both know the model and its weights. An attack of cosine or dlg takes 2 to 30 s per image and spec.
    """
    check_picture(picture)
    compared, notices = texts(specs or USUAL)
    if importlib.util.find_spec("torch") is None:
        raise UnsupportedError("grace-ext privacy differentiates models, for which it needs torch: pip install 'grace_ext[torch,privacy]'")
    import torch

    from ..attacks import study
    from ..attacks.victim import victim

    torch.set_num_threads(1)  # the models are small
    attacked = victim(model)
    study.similarity(attacked.inputs[0], attacked.inputs[0], 1.0)  # reports what is not installed before anything is attacked
    plan = study.Plan(attacked, applicable(attack, attacked, model), images, batch, step)
    with progress() as bar:
        units = len(compared) * len(plan.attacks) * 2 * plan.batches
        task = bar.add_task("attacking", total=units)
        rows = []
        for row in study.run(plan, compared, lambda done: bar.update(task, advance=done)):
            rows.append(row)
            bar.update(task, description=f"attacked {row.spec}")
        inferred = infer(model, compared, bar) if membership else []
    document = {
        "model": model, "batch": batch, "step": step, "images": plan.batches * batch, "rows": [as_row(row) for row in rows],
        "membership": [vars(found) for found in inferred], "notices": notices, "verdict": VERDICT,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(document, allow_nan=False))
    else:
        report(rows, inferred, document)
    if picture:
        from ..attacks.picture import draw

        originals = torch.cat([attacked.inputs[plan.chosen(number, step)] for number in range(plan.batches)])
        draw(originals, rows, attacked.box, picture)


def texts(specs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns (full specs, dense first; sentences about those that were completed). Raises an error for the first one that is not valid."""
    private = [text for text in specs if "privacy" in parse(text)]  # whose memory, if any, is part of what is tried
    found = [str(grace(text) if text in private else completed(text)) for text in (DENSE, *specs)]
    return list(dict.fromkeys(found)), completions([text for text in specs if text not in private])


def applicable(asked: Sequence[str] | None, victim: Victim, model: str) -> list[str]:
    """Returns the attacks that are asked for, or the usual ones. Raises ParameterError for one that is unknown or cannot be made."""
    for name in asked or ():
        if name not in ATTACKS:
            raise ParameterError(f"--attack is one of {', '.join(ATTACKS)}, got {name!r}")
    analytic = victim.first_layer() is not None
    if asked and "analytic" in asked and not analytic:
        raise ParameterError(
            f"--attack analytic needs a model whose first layer is fully connected and has a bias, and that of {model!r} is another: use "
            "dlg or cosine, or --model mlp"
        )
    return list(dict.fromkeys(asked or (["analytic", "cosine"] if analytic else ["cosine"])))


def infer(model: str, specs: Sequence[str], bar: Progress) -> list[Membership]:
    """Returns what membership inference finds with each spec, and with dense gradients of private examples."""
    from ..attacks.membership import PRIVATE
    from ..attacks.membership import infer as of
    from ..attacks.victim import victim

    task = bar.add_task("membership", total=len(specs) + 1)
    tick = lambda done: bar.update(task, advance=done)  # noqa: E731
    return [of(spec, lambda seed: victim(model, seed), tick) for spec in (*specs, str(grace(PRIVATE)))]


def as_row(row: Recovered) -> dict[str, Any]:
    """Returns the measures of a row in JSON types."""
    return {name: value for name, value in vars(row).items() if name != "inputs"}


def report(rows: Sequence[Recovered], inferred: Sequence[Membership], document: dict[str, Any]) -> None:
    """Prints the tables."""
    console = Console()
    console.width = max(console.width, 120)  # specs are long
    table = Table(box=None, pad_edge=False)
    for heading in ("spec", "attack", "attacker", "PSNR", "SSIM", "squared error", "labels"):
        table.add_column(heading, justify="left" if heading in ("spec", "attack", "attacker") else "right")
    for row in rows:
        ssim = "-" if row.ssim is None else f"{row.ssim:.2f}"
        labels = "-" if row.labels is None else f"{row.labels * document['images']:.0f} of {document['images']}"
        table.add_row(row.spec, row.attack, row.attacker, f"{row.psnr:.1f} dB", ssim, f"{row.mse:.2g}", labels)
    console.print(table)
    console.print(
        f"\n{document['model']}, {document['images']} examples in batches of {document['batch']}, step {document['step']}; means. "
        "100 dB: exact up to rounding. guess: other examples of the data.",
        style="dim",
        highlight=False,
    )
    console.print("naive: takes what payloads decode to for the gradient. adaptive: compares only what was sent.", style="dim")
    if inferred:
        table = Table(box=None, pad_edge=False)
        for heading in ("trained with", "membership AUC", "accuracy on members", "on others"):
            table.add_column(heading, justify="left" if heading == "trained with" else "right")
        for found in inferred:
            table.add_row(found.spec, f"{100 * found.auc:.1f}", f"{100 * found.train:.1f}%", f"{100 * found.test:.1f}%")
        console.print()
        console.print(table)
        console.print(
            "AUC: how often, in 100, a member has a lower loss than another example. A guess has 50.", style="dim", highlight=False
        )
    for notice in document["notices"]:
        console.print(f"Note: {notice}.", style="yellow", highlight=False, markup=False)
    console.print(f"\n[bold]{VERDICT}[/]", highlight=False)
