"""Times encoding and decoding of every compressor on the device beside a copy of the same gradient."""

from __future__ import annotations

import statistics
from typing import Any
from unittest import mock

import torch

import grace_ext
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.section import Found, Progress, Section, none_of, short
from grace_ext.exchange import lockstep
from grace_ext.papers.experiment import in_units
from grace_ext.planning.bench import PATIENCE, RANKS, SCALE, SETTLING, SMALLER
from grace_ext.planning.candidates import completed

#: Elements of the gradient: 64 MiB, which is more than a GPU's caches hold.
SIDE, DRY_SIDE = 4096, 64
WARM, COPIES = 2, 10


def copied(machine: Machine, gradient: torch.Tensor, times: int) -> float:
    """Returns the seconds of one copy, the median of several measurements of COPIES copies each."""
    room, found = torch.empty_like(gradient), []
    for _ in range(times + 1):
        start = machine.now()
        for _ in range(COPIES):
            room.copy_(gradient)
        found.append((machine.now() - start) / COPIES)
    return statistics.median(found[1:])


def timed(machine: Machine, world: Any, spec: str, side: int, times: int) -> tuple[float, float, float]:
    """Returns the seconds of encoding and of decoding per rank, and how many times smaller the payload is than the gradient.

    Encoding is what the step does until the last of its collectives is executed, the collectives not counted; decoding is the rest."""
    cluster = world.in_place(world.cluster(grace_ext.grace(spec), RANKS))
    settles = not machine.dry and hasattr(cluster.grace.leaves[0].compressor, "threshold")
    warm = SETTLING if settles else WARM
    drawn = [torch.randn((side, side), generator=torch.Generator().manual_seed(rank)) * float(SCALE) for rank in range(RANKS)]
    held, marks, original = [each.to(machine.device) for each in drawn], [0.0], lockstep.execute

    def execute(*arguments: Any) -> Any:
        marks.append(machine.now())
        out = original(*arguments)
        marks.append(machine.now())
        return out

    encodes, decodes = [], []
    for step in range(warm + times):
        gradients = [{"w": gradient.clone()} for gradient in held]
        marks[:] = [machine.now()]
        with mock.patch.object(lockstep, "execute", execute):
            cluster.step(gradients, lr=0.125)
        marks.append(machine.now())
        spans = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)]
        if step >= warm:
            encodes.append(sum(spans[:-1]) / RANKS)
            decodes.append(spans[-1] / RANKS)
    return statistics.median(encodes), statistics.median(decodes), held[0].nbytes / max(cluster.wire_bytes)


def measured(machine: Machine, world: Any, spec: str) -> list[Any]:
    """Returns the row of one spec. What would take long is measured on a smaller gradient."""
    side, times = (DRY_SIDE, 1) if machine.dry else (SIDE, 5)
    if not machine.dry:
        small = side // round(SMALLER**0.5)
        encode, decode, _ = timed(machine, world, spec, small, 1)
        if (encode + decode) * RANKS * SMALLER * (WARM + times) > PATIENCE:
            side = small
    encode, decode, smaller = timed(machine, world, spec, side, times)
    gradient = torch.zeros((side, side), device=machine.device)
    copy, gigabytes = copied(machine, gradient, times), gradient.nbytes / 1e9
    rates = [f"{gigabytes / seconds:.3g}" for seconds in (copy, encode, decode)]
    return [spec, side * side, *rates, *(round(seconds / copy, 1) for seconds in (encode, decode)), f"{smaller:.3g}"]


def run(machine: Machine, progress: Progress) -> Found:
    world, names = machine.world("torch-device"), grace_ext.compressors.names()
    rows, failed, done = [], [], in_units(progress, len(names))
    for name in names:
        spec = str(completed(name))
        try:
            rows.append(measured(machine, world, spec))
        except Exception as error:  # memory may not suffice for one of them
            failed.append(spec)
            rows.append([spec, short(error), *[""] * 6])
        done()
    notes = [
        "GB/s: bytes of the gradient per second and rank; encoding includes memory and commit, decoding is of the payloads of "
        f"{RANKS} ranks; a copy reads and writes, so its memory traffic is twice its GB/s",
        "encode / copy, decode / copy: how many times as long as the copy they take",
    ]
    columns = ["spec", "elements", "copy, GB/s", "encode, GB/s", "decode, GB/s", "encode / copy", "decode / copy", "times smaller"]
    return Found(columns, rows, [none_of("specs that ended with an error", len(rows), failed)], notes=notes)


SECTION = Section("speed", "GB/s of each compressor beside a copy", "TorchOps on the CPU, which says nothing about a GPU", run)
