"""Lists the systems that exchange.py compares: Horovod, DDP with torch's hooks, GRACE, and grace_ext, each with its memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class System:
    """Describes one system. name: unique in a cell. group: horovod, ddp, grace, ours, ours-ddp, tensorflow, links. job: for its ranks."""

    name: str
    group: str
    job: dict[str, Any] = field(default_factory=dict)

    @property
    def by_torchrun(self) -> bool:
        return "ddp" in self.group


DENSE = System("Horovod", "horovod", {"argument": "none"})
LINKS = System("links", "links")
ONE_BUCKET = 100_000
QUICK = ("Horovod", "Horovod fp16", "topk", "efsignsgd")


def horovod() -> list[System]:
    return [DENSE, System("Horovod fp16", "horovod", {"argument": "fp16"})]


def ddp() -> list[System]:
    return [
        System("DDP", "ddp", {"argument": "dense", "bucket_mb": None}),
        System("DDP fp16 hook", "ddp", {"argument": "fp16", "bucket_mb": None}),
        System("DDP powerSGD hook, rank 4, one bucket", "ddp", {"argument": "powersgd", "bucket_mb": ONE_BUCKET}),
    ]


def specs(threshold: float) -> dict[str, str]:
    """Returns grace_ext's specs by name."""
    return {
        "threshold": f"threshold(threshold={threshold}) + residual",
        "topk": "topk(ratio=0.01) + residual",
        "randomk": "randomk(ratio=0.01) + residual(beta=0.9)",
        "signsgd": "signsgd + none",
        "efsignsgd": "efsignsgd + residual",
        "onebit": "onebit + residual",
        "terngrad": "terngrad",
        "qsgd 4-bit": "qsgd(bits=4)",
        "qsgd 8-bit": "qsgd(bits=8)",
        "fp16": "fp16",
        "powersgd": "powersgd(rank=4) + residual",
        "none": "none",
    }


def ours(threshold: float) -> list[System]:
    made = [System(name, "ours", {"argument": spec}) for name, spec in specs(threshold).items()]
    made[0].job["threshold"] = threshold
    return made


def ours_ddp() -> list[System]:
    return [
        System("DDP hook powersgd, one bucket", "ours-ddp", {"argument": "powersgd(rank=4) + residual", "bucket_mb": ONE_BUCKET}),
        System("DDP hook topk", "ours-ddp", {"argument": "topk(ratio=0.01) + residual", "bucket_mb": None}),
    ]


def grace(path: str, threshold: float) -> list[System]:
    """Lists GRACE's compressors with the memories that its documentation pairs them with."""
    ag = {"communicator": "allgather"}
    residual = {"memory": "residual", **ag}
    wanted = {
        "topk": {"compress_ratio": 0.01, **residual},
        "randomk": {"compress_ratio": 0.01, **residual},
        "threshold": {"threshold": threshold, **residual},
        "dgc": {"compress_ratio": 0.01, "memory": "dgc", **ag},
        "terngrad": ag,
        "qsgd": {"quantum_num": 127, **ag},
        "signsgd": ag,
        "efsignsgd": {"memory": "efsignsgd", "lr": 0.1, **ag},
        "onebit": residual,
        "natural": ag,
        "powersgd": {"memory": "powersgd", "compress_rank": 4, "communicator": "allreduce"},
        "fp16": {"communicator": "allreduce"},
        "none": {"communicator": "allreduce"},
    }
    made = [System(f"GRACE {name}", "grace", {"grace": path, "params": {"compressor": name, **more}}) for name, more in wanted.items()]
    made[2].job["threshold"] = threshold
    return made


def tensorflow() -> list[System]:
    """Lists the TensorFlow systems, to compare with the torch systems of the same names."""
    wanted = {"Horovod": "", "topk": "topk(ratio=0.01) + residual", "efsignsgd": "efsignsgd + residual", "qsgd 8-bit": "qsgd(bits=8)"}
    return [System(f"TensorFlow {name}", "tensorflow", {"argument": spec}) for name, spec in wanted.items()]


def listed(threshold: float, *, grace_path: str | None, framework: str, quick: bool, only: list[str]) -> list[System]:
    """Returns the systems to run, in order. DENSE is first; exchange.py runs it once more at the end. only: parts of names."""
    torch_ones = [*horovod(), *ours(threshold), *ddp(), *ours_ddp(), *(grace(grace_path, threshold) if grace_path else [])]
    tf_ones = tensorflow()
    beside = {s.name.removeprefix("TensorFlow ") for s in tf_ones}
    every = {
        "torch": torch_ones,
        "tensorflow": [s for s in torch_ones if s.name in beside] + tf_ones,
        "both": torch_ones + tf_ones,
    }[framework]
    if quick:
        every = [s for s in every if s.name in QUICK]
    return [s for s in every if s is DENSE or not only or any(word.lower() in s.name.lower() for word in only)]
