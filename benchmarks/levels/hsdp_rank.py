"""Runs one rank of hsdp.py: trains one model per system, with alternating steps, and times them.  hsdp_rank.py JOB.json"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from grace_ext.frameworks.torch import fsdp_hook

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import timing
from benchmarks.exchange.base import DistWorld


class Transformer(nn.Module):
    """A decoder of characters, pre-norm, with torch's layers."""

    def __init__(self, width: int, heads: int, layers: int, vocabulary: int, length: int):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.token(tokens) + self.position(torch.arange(length))
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


class System:
    """Trains with one way of exchange. how: that of FSDP2 (float32, bfloat16, or nothing between hosts), or a spec for fsdp_hook."""

    def __init__(self, how: str, job: dict[str, Any], mesh: DeviceMesh):
        torch.manual_seed(0)
        self.model = Transformer(**job["model"], length=job["length"])
        hooked = how not in ("float32", "bfloat16", "nothing")
        reduce = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)} if how == "bfloat16" else {}
        for module in (*self.model.layers, self.model):
            fully_shard(module, mesh=mesh["shard"] if hooked or how == "nothing" else mesh, **reduce)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.state = fsdp_hook(how, self.model, mesh["replicate"], self.optimizer) if hooked else None
        self.seen: dict[str, list[float]] = {part: [] for part in ("step", "forward", "backward", "optimizer", "sent")}
        self.loss = 0.0

    def step(self, tokens: torch.Tensor, world: DistWorld) -> None:
        self.optimizer.zero_grad()
        world.barrier()
        before, marks = timing.transmitted() or 0, [time.perf_counter()]
        logits = self.model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        self.optimizer.step()
        marks.append(time.perf_counter())
        world.barrier()  # by now every rank of this host has sent everything
        self.loss = loss.item()
        lasted = [end - begin for begin, end in zip(marks, marks[1:], strict=False)]
        sent = (timing.transmitted() or 0) - before
        for part, value in zip(self.seen, (marks[-1] - marks[0], *lasted, sent), strict=True):
            self.seen[part].append(value)

    def report(self, warmups: int) -> dict[str, Any]:
        timed = {part: values[warmups:] for part, values in self.seen.items()}
        return {**timed, "wire_bytes": self.state.wire_bytes if self.state else 0, "loss": self.loss}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    world = DistWorld()
    # torchrun numbers ranks host by host, so that a row of the mesh is a host
    mesh = init_device_mesh("cpu", (job["hosts"], world.size // job["hosts"]), mesh_dim_names=("replicate", "shard"))
    systems = {name: System(how, job, mesh) for name, how in job["systems"].items()}
    generator = torch.Generator().manual_seed(world.rank)
    for _ in range(job["warmups"] + job["steps"]):
        tokens = torch.randint(job["model"]["vocabulary"], (job["batch"], job["length"] + 1), generator=generator)
        for system in systems.values():
            system.step(tokens, world)
    elements = sum(p.numel() for p in next(iter(systems.values())).model.parameters())
    reports = {name: system.report(job["warmups"]) for name, system in systems.items()}
    (Path(job["out"]) / f"rank{world.rank}.json").write_text(json.dumps({"elements": elements, "systems": reports}))
    world.barrier()
    world.close()


if __name__ == "__main__":
    main()
