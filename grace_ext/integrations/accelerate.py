"""`compress` makes a model that Accelerate has prepared exchange its gradients compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.nn.parallel import DistributedDataParallel

from ..checkpoints.checkpoint import save
from ..checkpoints.saveable import LOG
from ..composition.grace import Grace
from ..composition.making import grace
from ..errors import ParameterError, UnsupportedError
from ..frameworks.torch.ddp import DDPState, compress_ddp, ddp_comm_hook
from .beside import FOLDER, load_if_saved

#: What to do where Accelerate has made no DDP, by the name of its distributed type.
WAYS_OUT = {
    "FSDP": "leave FSDP out (fsdp_plugin=, TrainingArguments(fsdp=...)), or write the loop yourself, with fully_shard and hvd.fsdp_hook",
    "DEEPSPEED": "leave DeepSpeed out (deepspeed_plugin=, TrainingArguments(deepspeed=...)), which reduces the gradients itself",
    "MEGATRON_LM": "leave Megatron-LM out (megatron_lm_plugin=), which reduces the gradients itself",
    "NO": "start the script with torchrun, one process per device",
}
_counts: WeakKeyDictionary[Accelerator, int] = WeakKeyDictionary()  # how many models of an accelerator are compressed


def compress(
    accelerator: Accelerator, g: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> DDPState:
    """Makes a model that `accelerator.prepare` returned exchange its gradients compressed, and returns the state of its DDP hook.

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        state = compress(accelerator, "topk(ratio=0.01) + residual", model, optimizer)

    g: what grace_ext.grace takes. optimizer: the one that trains the model, prepared or not. options: those of `ddp_comm_hook`. The
    accelerator's GradScaler (mixed_precision='fp16') needs no option.
    `accelerator.save_state` and `load_state` then also save and load every rank's memory, in the folder 'grace_ext' of the checkpoint
    ('grace_ext-1' for the second model that is compressed, and so on), which all hosts must share.
    In a job of one process there is no DDP, and nothing is compressed. Raises UnsupportedError where Accelerate shards the model (FSDP,
    DeepSpeed, Megatron-LM), and ParameterError for a model that is not prepared."""
    state = compressed(accelerator, grace(g), model, optimizer, **options)
    number = _counts[accelerator] = _counts.get(accelerator, -1) + 1
    folder = f"{FOLDER}-{number}" if number else FOLDER
    if isinstance(bare(model), DistributedDataParallel):
        accelerator.register_save_state_pre_hook(lambda models, weights, output_dir: save(state, Path(output_dir, folder)))
        accelerator.register_load_state_pre_hook(lambda models, input_dir: load_if_saved(state, Path(input_dir, folder)))
    return state


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the module behind torch.compile, which Accelerate puts in front of the DDP."""
    return getattr(model, "_orig_mod", model)


def compressed(accelerator: Accelerator, g: Grace, model: torch.nn.Module, optimizer: Any, **options: Any) -> DDPState:
    """Registers the hook on this prepared model, and returns its state. Checkpoints are the caller's."""
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer  # grace_ext checks the kind of the optimizer
    ddp = bare(model)
    if isinstance(ddp, DistributedDataParallel):
        return compress_ddp(g, ddp, optimizer, **{"scaler": accelerator.scaler, **options})
    kind, name = accelerator.distributed_type.value, type(ddp).__name__
    if kind in WAYS_OUT and (kind != "NO" or isinstance(ddp, torch.nn.DataParallel) or g.acts_alone or options.get("simulate")):
        raise UnsupportedError(
            f"grace_ext compresses what DistributedDataParallel exchanges, and Accelerate has put no DistributedDataParallel around this "
            f"model ({name}, distributed type {kind}): {WAYS_OUT[kind]}"
        )
    if kind != "NO":
        raise ParameterError(
            f"compress(accelerator, g, model, optimizer) takes the DistributedDataParallel that accelerator.prepare returns, and got "
            f"{name}: call it after prepare, with the model that prepare returned"
        )
    LOG.warning("this job has one process, so no gradients are exchanged, and nothing is compressed")
    return ddp_comm_hook(g, ddp, optimizer, **options)[0]
