"""Cases of the strategy for Lightning on 2 ranks under torchrun."""

from __future__ import annotations

import gc
import logging
import shutil
import sys
import warnings
import weakref
from pathlib import Path

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import grace_ext.frameworks.torch as hvd
from grace_ext.errors import GraceError, IncompatiblePartsError, ParameterError, UnsupportedError
from grace_ext.integrations.lightning import CompressionStrategy

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import assert_same, heard, raises, run_cases  # noqa: E402
from trainers import SPECS, Fed, Points, in_cluster, on_rank_0, sgd, shared_folder, weights_of  # noqa: E402

TOPK, POWERSGD = SPECS
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(L.LightningModule):
    def __init__(self, optimizer=sgd):
        super().__init__()
        self.fed, self.optimizer, self.sent = Fed(), optimizer, []

    def training_step(self, batch, index):
        return self.fed(**batch)["loss"]

    def configure_optimizers(self):
        return self.optimizer(self.fed)

    def on_train_batch_end(self, *_):
        self.sent.append(self.trainer.strategy.state.wire_bytes)


def fit(strategy, steps=6, ckpt_path=None, module=None, callbacks=(), passes=1, **more):
    """Trains in epochs of three steps, because Lightning resumes exactly between epochs, and returns the module and the trainer."""
    module = module or Module()
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=steps, accumulate_grad_batches=passes,
        limit_train_batches=3 * passes, callbacks=list(callbacks), logger=False,
        enable_checkpointing=bool(callbacks), enable_model_summary=False, enable_progress_bar=False, **more,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, DataLoader(Points(), batch_size=8), ckpt_path=ckpt_path)
    return module, trainer


def case_equals_local_cluster():
    """Also with accumulation, clipping and options of DDP."""
    for g, options, passes, clip in ((TOPK, {}, 1, None), (POWERSGD, {"find_unused_parameters": True}, 2, 0.05)):
        module, _ = fit(CompressionStrategy(g, **options), passes=passes, gradient_clip_val=clip)
        weights, expected = in_cluster(g, module.fed.batches, sgd, passes, clip, prefix="fed.")
        assert_same(weights_of(module.fed), weights)
        assert module.sent[passes - 1 :: passes] == expected, (module.sent, expected)


def case_resume():
    """From a checkpoint of a step, from 'last', which is a link to one, and from one whose memory is missing."""
    folder = shared_folder()
    for g in (TOPK, POWERSGD):
        keep = ModelCheckpoint(folder, filename="at-{step}", every_n_train_steps=3, save_top_k=-1, save_last="link")
        whole, _ = fit(CompressionStrategy(g), callbacks=[keep])
        assert sorted(p.name for p in folder.glob("at-*")) == [f"at-step={n}.ckpt{more}" for n in (3, 6) for more in ("", ".grace_ext")]
        resumed, _ = fit(CompressionStrategy(g), ckpt_path=str(folder / "at-step=3.ckpt"))
        assert len(resumed.sent) == 3
        assert_same(weights_of(resumed.fed), weights_of(whole.fed))
        longer, _ = fit(CompressionStrategy(g), steps=9, callbacks=[])
        resumed, _ = fit(CompressionStrategy(g), steps=9, ckpt_path=str(folder / "last.ckpt"))
        assert_same(weights_of(resumed.fed), weights_of(longer.fed))
        on_rank_0(lambda: shutil.rmtree(folder / "at-step=6.ckpt.grace_ext"))
        with heard() as said:
            fit(CompressionStrategy(g), steps=7, ckpt_path=str(folder / "last.ckpt"))
        assert len(said) == (hvd.rank() == 0) and all("starts at zero" in line for line in said), said
        on_rank_0(lambda: [shutil.rmtree(folder), folder.mkdir()])
    on_rank_0(lambda: shutil.rmtree(folder))


def case_memory_goes_with_its_checkpoint():
    """Lightning replaces and removes checkpoints; only the weights have no memory."""
    folder = shared_folder()
    _, trainer = fit(
        CompressionStrategy(TOPK), callbacks=[ModelCheckpoint(folder, every_n_train_steps=2, filename="{step}", save_last=True)]
    )
    dist.barrier()
    assert sorted(p.name for p in folder.iterdir()) == ["last.ckpt", "last.ckpt.grace_ext", "step=6.ckpt", "step=6.ckpt.grace_ext"]
    assert [p.name for p in (folder / "last.ckpt.grace_ext").iterdir()] == ["step-6"]
    dist.barrier()  # the other rank has seen the folder, too
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    assert not (folder / "weights.ckpt.grace_ext").exists()
    on_rank_0(lambda: shutil.rmtree(folder))


def case_refuses():
    raises(GraceError, "trainer.fit() first", lambda: CompressionStrategy(TOPK).state)
    raises(ParameterError, "leave ddp_comm_hook", lambda: CompressionStrategy(TOPK, ddp_comm_hook=print))
    raises(IncompatiblePartsError, "applied twice", lambda: fit(CompressionStrategy("topk(ratio=0.1) + dgc")))
    _, trainer = fit(CompressionStrategy(TOPK), steps=1)
    raises(UnsupportedError, "remote store", lambda: trainer.save_checkpoint("s3://bucket/x.ckpt"))


def case_is_freed():
    module, trainer = fit(CompressionStrategy(TOPK), steps=2)
    watch = weakref.ref(trainer.strategy.state)
    del module, trainer
    gc.collect()
    assert watch() is None


hvd.init()
run_cases(hvd, dict(globals()))
hvd.shutdown()
