"""Counts what one step costs on the device: launches, waits of the host, copies; and its host time for ResNet-50's shapes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch

import grace_ext
from benchmarks.common.shapes import resnet50
from benchmarks.gpu.machine import Machine, counted
from benchmarks.gpu.section import Check, Found, Progress, Section, none_of
from grace_ext.papers.experiment import in_units
from tools import device_budgets

RANKS = device_budgets.RANKS
Shapes = Iterable[tuple[int, ...]]
COUNTS = ("launches", "waits", "uploads", "downloads")
#: What ResNet-50 is exchanged with; a dry run takes the first two.
STEP_SPECS = (
    "none + none", "topk(ratio=0.01) + residual", "efsignsgd + residual", "qsgd(bits=4) + none", "powersgd(rank=4) + residual",
)  # fmt: skip
#: In a dry run no side of a tensor is longer. Launches and waits hardly depend on it.
LONGEST = 64


class Steps:
    """Makes steps of a cluster in which every tensor has new gradients, as backward() leaves them."""

    def __init__(self, world: Any, spec: str, shapes: Shapes, device: Any):
        self.cluster = world.in_place(world.cluster(grace_ext.grace(spec), RANKS))
        generator = torch.Generator().manual_seed(0)
        self.drawn = [{f"w{i}": torch.randn(shape, generator=generator).to(device) for i, shape in enumerate(shapes)} for _ in range(RANKS)]
        self.renew()

    def renew(self) -> None:
        self.gradients = [{name: tensor.clone() for name, tensor in rank.items()} for rank in self.drawn]

    def step(self) -> None:
        self.cluster.step(self.gradients, lr=0.125)


def costs(machine: Machine, spec: str, shapes: Shapes) -> dict[str, float]:
    """Returns what the third step costs per rank; on the pretended device the second."""
    if machine.dry:
        return device_budgets.measure(spec, list(shapes))
    steps = Steps(machine.world(""), spec, shapes, machine.device)
    for _ in range(2):
        steps.step()
        steps.renew()
    return {name: number / RANKS for name, number in counted(steps.step).items()}


def waits(machine: Machine, progress: Progress) -> Found:
    budgets = json.loads(device_budgets.FILE.read_text())
    buckets = {"20 tensors": device_budgets.BUCKETS["20 tensors"]} if machine.dry else device_budgets.BUCKETS
    rows, above, done = [], [], in_units(progress, len(device_budgets.SPECS) * len(buckets))
    for spec in device_budgets.SPECS:
        for bucket, shapes in buckets.items():
            found, budget = costs(machine, spec, shapes), budgets[spec][bucket]["waits"]
            rows.append([spec, bucket, *(round(found[name], 1) for name in COUNTS), budget])
            above += [spec] if found["waits"] > budget else []
            done()
    notes = ["per rank and step, two ranks in one process; waits: how often the host waits for the device"]
    if not machine.dry:
        notes.append("launches and copies are of torch.profiler, sums of the two ranks included; waits of torch.cuda.set_sync_debug_mode")
    return Found(["spec", "bucket", *COUNTS, "waits budgeted"], rows, [none_of("waits above the budget", len(rows), above)], notes=notes)


def host_time(machine: Machine, spec: str, shapes: Shapes) -> tuple[float, float]:
    """Returns milliseconds per rank and step: until the step's call returns, and until the device has done it."""
    steps, called, finished = Steps(machine.world("torch-device"), spec, shapes, machine.device), [], []
    for number in range(5):
        steps.renew()
        start = machine.now()
        steps.step()
        returned = time.perf_counter()
        if number > 1:
            called.append(1000 * (returned - start) / RANKS)
            finished.append(1000 * (machine.now() - start) / RANKS)
    return statistics.median(called), statistics.median(finished)


def step(machine: Machine, progress: Progress) -> Found:
    shapes = list(resnet50().values())
    if machine.dry:
        shapes = [tuple(min(side, LONGEST) for side in shape) for shape in shapes]
    chosen = STEP_SPECS[:2] if machine.dry else STEP_SPECS
    rows, done = [], in_units(progress, 2 * len(chosen))
    for spec in chosen:
        found = costs(machine, spec, shapes)
        done()
        called, finished = host_time(machine, spec, shapes)
        done()
        rows.append([spec, *(round(found[name]) for name in COUNTS), round(called, 2), round(finished, 2)])
    notes = [f"per rank and step, {len(shapes)} tensors, two ranks in one process"]
    if machine.dry:
        notes.append(
            f"no side longer than {LONGEST}; the counts are the pretended device's, the times those of the same operations on the CPU"
        )
    checks = [Check(f"steps measured, of {len(chosen)}", len(rows), len(rows) == len(chosen))]
    return Found(["spec", *COUNTS, "host, ms", "whole step, ms"], rows, checks, notes=notes)


WAITS = Section("waits", "how often the host waits for the device", "the pretended device, one bucket of 20 tensors", waits)
STEP = Section(
    "step", "launches and host time of a step of ResNet-50", "the pretended device (counts) and TorchOps on the CPU (times), small", step
)
