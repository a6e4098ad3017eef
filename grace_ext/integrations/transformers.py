"""`CompressionCallback` makes Hugging Face's Trainer exchange its gradients compressed."""

from __future__ import annotations

import traceback
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.checkpoint import save
from ..checkpoints.saveable import LOG
from ..composition.making import grace
from ..errors import GraceError, UnsupportedError
from ..frameworks.torch.ddp import DDPState
from .accelerate import bare, compressed
from .beside import FOLDER, load_if_saved


class CompressionCallback(TrainerCallback):
    """Makes a Trainer exchange its gradients compressed, and keeps the memory in the Trainer's checkpoints:

        trainer = Trainer(..., callbacks=[CompressionCallback("powersgd(rank=4) + residual")])

    compression: what grace_ext.grace takes. options: those of `ddp_comm_hook`.
    state: the state of the hook, once the training has begun; it tells `wire_bytes` and `metrics()`.

    Start the script with torchrun, so that Trainer makes a DistributedDataParallel; in a job of one process nothing is compressed. Every
    checkpoint gets a folder 'grace_ext' with one file per rank, so all hosts must share `output_dir`. A training that resumes from such a
    checkpoint continues bit for bit; on another number of ranks the memory is resized, as by `grace_ext.load`.
    Raises UnsupportedError when the training begins, if Trainer shards the model (FSDP, DeepSpeed) or drives several devices from one
    process."""

    def __init__(self, compression: Any, **options: Any):
        self.compression, self._options = grace(compression), options
        self._state: DDPState | None = None
        self._on: Any = lambda: None  # a weak reference to the model that has the hook

    @property
    def state(self) -> DDPState:
        if self._state is None:
            raise GraceError("there is no exchange before the training begins: call trainer.train() first")
        return self._state

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer, checkpoint = _training()
        if state.is_hyper_param_search and args.save_strategy != "no" and not args.save_only_model:
            raise UnsupportedError(
                "in a search of hyperparameters, trials have folders of their own, in which CompressionCallback cannot save its memory: "
                "search with TrainingArguments(save_strategy='no') or save_only_model=True"
            )
        model: torch.nn.Module = bare(trainer.model_wrapped)
        if self._state is None or self._on() is not model:  # else this Trainer trains again, with the DDP that it has
            self._state = compressed(trainer.accelerator, self.compression, model, trainer.optimizer, **self._options)
            self._on = weakref.ref(model)
        if checkpoint is not None and isinstance(model, DistributedDataParallel):
            load_if_saved(self._state, Path(checkpoint, FOLDER))
        elif checkpoint is not None and Path(checkpoint, FOLDER).exists():
            LOG.warning(f"this job has one process, so the memory of compression in {checkpoint} is not loaded, and is lost")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Without the optimizer's state Trainer cannot resume exactly either.
        if self._state is not None and isinstance(self._on(), DistributedDataParallel) and not args.save_only_model:
            save(self._state, Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", FOLDER))


def _training() -> tuple[Trainer, str | None]:
    """Returns the Trainer whose training begins, and the checkpoint from which it resumes. Trainer tells its callbacks neither, so they are
    looked up in its call."""
    for frame, _ in traceback.walk_stack(None):
        there = frame.f_locals
        if issubclass(type(there.get("self")), Trainer) and "resume_from_checkpoint" in there:
            return there["self"], there["resume_from_checkpoint"]
    raise GraceError("CompressionCallback.on_train_begin is for Trainer.train, which did not call it: pass the callback to Trainer")
