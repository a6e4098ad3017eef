"""Cases of the callback for Hugging Face's Trainer on 2 ranks under torchrun, and `alone` on one rank."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

import grace_ext.frameworks.torch as hvd
from grace_ext.errors import GraceError, IncompatiblePartsError, UnsupportedError
from grace_ext.integrations.transformers import CompressionCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import assert_same, heard, raises, run_cases  # noqa: E402
from trainers import SPECS, Fed, Points, in_cluster, sgd, shared_folder, weights_of  # noqa: E402

TOPK, POWERSGD = SPECS


class Sent(TrainerCallback):
    """Keeps the bytes of each step."""

    def __init__(self, compression):
        self.compression, self.sent = compression, []

    def on_step_end(self, args, state, control, **_):
        self.sent.append(self.compression.state.wire_bytes)


def trainer_of(folder, *callbacks, steps=6, optimizer=sgd, model=None, **more):
    model = model or Fed()
    options = {"ddp_backend": "gloo"} if hvd.size() > 1 else {}
    options |= {"max_steps": steps, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "save_strategy": "no", **more}
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], logging_strategy="no", disable_tqdm=True, **options)
    return Trainer(model=model, args=arguments, train_dataset=Points(), callbacks=list(callbacks), optimizers=(optimizer(model), None))


def case_equals_local_cluster():
    """Also with accumulation and clipping, and if Trainer compiles the DDP."""
    for g, more in (
        (TOPK, {}),
        (POWERSGD, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}),
        (TOPK, {"torch_compile": True, "torch_compile_backend": "eager", "max_grad_norm": 0}),
    ):
        callback = CompressionCallback(g)
        trainer = trainer_of("unused", callback, sent := Sent(callback), **more)
        trainer.train()
        passes, clip = more.get("gradient_accumulation_steps", 1), more.get("max_grad_norm", 1.0)
        weights, expected = in_cluster(g, trainer.model.batches, sgd, passes, clip or None)
        assert_same(weights_of(trainer.model), weights)
        assert sent.sent == expected, (sent.sent, expected)


def case_resume():
    for g, more in ((TOPK, {"gradient_accumulation_steps": 2}), (POWERSGD, {})):
        folder = shared_folder()
        whole = trainer_of(folder, CompressionCallback(g), save_strategy="steps", save_steps=3, **more)
        whole.train()
        assert sorted(p.name for p in (folder / "checkpoint-3" / "grace_ext").glob("rank-*")) != []
        moved = folder / "moved"
        dist.barrier()
        if hvd.rank() == 0:
            shutil.move(folder / "checkpoint-3", moved)
            shutil.rmtree(folder / "checkpoint-6")
        dist.barrier()
        resumed = trainer_of(folder, callback := CompressionCallback(g), sent := Sent(callback), **more)
        resumed.train(resume_from_checkpoint=str(moved))
        assert len(sent.sent) == 3
        assert_same(weights_of(resumed.model), weights_of(whole.model))
        dist.barrier()
        if hvd.rank() == 0:
            shutil.rmtree(folder)


def case_resume_from_the_last_checkpoint_and_from_one_without_memory():
    folder = shared_folder()
    first = trainer_of(folder, CompressionCallback(TOPK), steps=3, save_strategy="steps", save_steps=3)
    first.train()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with heard() as said:
        trainer_of(folder, callback := CompressionCallback(TOPK), steps=4).train(resume_from_checkpoint=True)
    assert said == [] and callback.state.state_dict()["step"] == 4, said
    dist.barrier()
    if hvd.rank() == 0:
        shutil.rmtree(folder / "checkpoint-3" / "grace_ext")
    dist.barrier()
    with heard() as said:
        trainer_of(folder, callback := CompressionCallback(TOPK), steps=4).train(resume_from_checkpoint=True)
    assert callback.state.state_dict()["step"] == 1
    assert len(said) == (hvd.rank() == 0) and all("starts at zero" in line for line in said), said
    dist.barrier()
    if hvd.rank() == 0:
        shutil.rmtree(folder)


def case_only_the_model_is_saved():
    folder = shared_folder()
    trainer_of(folder, CompressionCallback(TOPK), steps=1, save_strategy="steps", save_steps=1, save_only_model=True).train()
    assert (folder / "checkpoint-1").exists() and not (folder / "checkpoint-1" / "grace_ext").exists()
    dist.barrier()
    if hvd.rank() == 0:
        shutil.rmtree(folder)


def case_trains_again():
    """A second `train` goes on with the same DDP, and the memory of the first."""
    callback = CompressionCallback(TOPK)
    trainer = trainer_of("unused", callback, steps=2)
    trainer.train()
    before = callback.state
    trainer.train()
    assert callback.state is before and before.state_dict()["step"] == 4


def case_refuses():
    raises(GraceError, "topkk", lambda: CompressionCallback("topkk"))
    raises(GraceError, "trainer.train() first", lambda: CompressionCallback(TOPK).state)
    callback = CompressionCallback("topk(ratio=0.1) + dgc")
    raises(IncompatiblePartsError, "applied twice", trainer_of("unused", callback).train)  # it sees the SGD behind Accelerate's optimizer
    raises(UnsupportedError, "one hook only", trainer_of("unused", CompressionCallback(TOPK), CompressionCallback(POWERSGD)).train)
    arguments = TrainingArguments(output_dir="unused", use_cpu=True)
    state = transformers.TrainerState()
    raises(
        GraceError, "for Trainer.train", lambda: CompressionCallback(TOPK).on_train_begin(arguments, state, transformers.TrainerControl())
    )
    searching = trainer_of("unused", CompressionCallback(TOPK), save_strategy="steps")
    searching._hp_search_setup = lambda trial: None
    raises(UnsupportedError, "search of hyperparameters", lambda: searching.train(trial={}))


def alone():
    """One process has no DDP: nothing is compressed, and what would act alone is refused."""
    with heard() as said:
        trainer = trainer_of("unused", callback := CompressionCallback(TOPK), steps=2)
        trainer.train()
    assert callback.state.wire_bytes == 0 and ["one process" in line for line in said] == [True], said
    raises(UnsupportedError, "start the script with torchrun", trainer_of("unused", CompressionCallback("signsgd"), steps=1).train)
    print("ALONE ok")


hvd.init()
run_cases(hvd, dict(globals()))
hvd.shutdown()
