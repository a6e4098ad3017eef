"""Keeps the memory of compression in a folder in, or beside, a trainer's checkpoint. Trainers write a checkpoint on rank 0, and the memory
differs by rank, so it cannot be a part of what they write: `grace_ext.save` writes one file per rank."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from ..checkpoints.checkpoint import load
from ..checkpoints.files import MANIFEST
from ..checkpoints.saveable import LOG
from ..frameworks.torch.ddp import DDPState

#: The name of the folder in a trainer's checkpoint.
FOLDER = "grace_ext"


def load_if_saved(state: DDPState, folder: Path) -> None:
    """Loads the memory that `grace_ext.save` wrote to this folder. If rank 0 finds none there, because the checkpoint was made without
    compression or its save was not finished, the memory starts at zero, and rank 0 logs a warning. Every rank calls it."""
    found = [(folder / MANIFEST).exists()]
    dist.broadcast_object_list(found, src=0)  # so that all ranks do the same, even if only some hosts see the folder
    if found[0]:
        load(state, folder)
    elif dist.get_rank() == 0:
        LOG.warning(
            f"{folder} has no memory of compression: the checkpoint was saved without compression, or its save was not finished. Training "
            "resumes, and the memory starts at zero"
        )
