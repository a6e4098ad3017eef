"""`CompressionStrategy` makes Lightning's Trainer exchange its gradients compressed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn

from ..checkpoints.checkpoint import save
from ..composition.making import grace
from ..errors import GraceError, ParameterError, UnsupportedError
from ..frameworks.torch.ddp import DDPState, compress_ddp
from .beside import FOLDER, load_if_saved


class CompressionStrategy(DDPStrategy):
    """Lightning's DDPStrategy with compressed gradients, on CPUs and GPUs. The memory is kept with Lightning's checkpoints:

        trainer = Trainer(strategy=CompressionStrategy("topk(ratio=0.01) + residual"), devices=2)

    compression: what grace_ext.grace takes. options: those of `ddp_comm_hook`. kwargs: those of DDPStrategy.
    state: the state of the hook, once `fit` has begun; it tells `wire_bytes` and `metrics()`.

    The memory of checkpoint x.ckpt is in the folder x.ckpt.grace_ext beside it, with one file per rank, so all hosts must share it. Move
    both together. `fit(ckpt_path=...)` continues bit for bit; on another number of ranks the memory is resized, as by `grace_ext.load`."""

    def __init__(self, compression: Any, options: Mapping[str, Any] | None = None, **kwargs: Any):
        if kwargs.get("ddp_comm_hook") or kwargs.get("ddp_comm_state"):
            raise ParameterError(
                "CompressionStrategy registers a hook itself, and DDP takes one: leave ddp_comm_hook and ddp_comm_state out"
            )
        super().__init__(**kwargs)
        self.compression, self._options = grace(compression), dict(options or {})
        self._state: DDPState | None = None
        self._loaded: tuple[Any, Mapping[str, Any]] | None = None  # the checkpoint that was loaded: its path and content

    @property
    def state(self) -> DDPState:
        if self._state is None:
            raise GraceError("there is no exchange before the training begins: call trainer.fit() first")
        return self._state

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        loaded, self._loaded = self._loaded, None
        if trainer.state.fn == TrainerFn.FITTING:
            assert self.model is not None
            options = {"scaler": getattr(self.precision_plugin, "scaler", None), **self._options}
            self._state = compress_ddp(self.compression, self.model, next(iter(self.optimizers), None), **options)
            if loaded is not None:
                load_if_saved(self._state, _folder(*loaded))

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        self._loaded = checkpoint_path, {"global_step": checkpoint["global_step"]}
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._state is not None and "optimizer_states" in checkpoint:  # not if only the weights are saved
            folder = _folder(filepath, checkpoint)
            save(self._state, folder)
            super().save_checkpoint(checkpoint, filepath, storage_options)
            if self.is_global_zero:  # only now: until then the checkpoint that was there before is valid, with its memory
                for other in set(folder.parent.iterdir()) - {folder}:
                    shutil.rmtree(other)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            shutil.rmtree(f"{os.path.realpath(filepath)}.{FOLDER}", ignore_errors=True)


def _folder(filepath: Any, checkpoint: Mapping[str, Any]) -> Path:
    """Returns the folder of the memory of this checkpoint. It contains the step, because a checkpoint may be saved under the same name
    again. Raises UnsupportedError if the checkpoint is in no file system."""
    if "://" in str(filepath):
        raise UnsupportedError(
            f"the memory of compression needs a folder that all hosts share, and {filepath} is a remote store: save checkpoints to a "
            "file system, and copy them from there"
        )
    path = os.path.realpath(filepath)  # 'last.ckpt' may be a link to the checkpoint beside which the memory lies
    return Path(f"{path}.{FOLDER}", f"step-{checkpoint['global_step']}")
