"""Tests `fsdp_hook` in real jobs of 4 and of 8 ranks: each case of jobs/fsdp_*job.py is a test, and must hold on every rank."""

from __future__ import annotations

import pytest
import torch

import grace_ext
from grace_ext.errors import UnsupportedError
from grace_ext.frameworks.torch.resharding import _sort_keys, rows_of

from .support import training
from .test_jobs import cases_of, held


@pytest.mark.parametrize("number", range(len(training.SHARDED_SPECS)), ids=training.SHARDED_SPECS)
def test_equals_local_clusters(number):
    assert f"case_spec_{number}" in held("torchrun", 4, "fsdp_job.py")


@pytest.mark.parametrize("case", cases_of("fsdp_use_job.py"))
def test_use(case):
    assert case in held("torchrun", 4, "fsdp_use_job.py")


@pytest.mark.parametrize("case", cases_of("fsdp_refused_job.py"))
def test_state_and_refused_uses(case):
    assert case in held("torchrun", 4, "fsdp_refused_job.py")


@pytest.mark.parametrize("case", cases_of("fsdp_dcp_job.py"))
def test_sharded_checkpoints(case):
    assert case in held("torchrun", 4, "fsdp_dcp_job.py")


@pytest.mark.parametrize("case", cases_of("fsdp_low_rank_job.py"))
def test_shards_that_share_q(case):
    assert case in held("torchrun", 4, "fsdp_low_rank_job.py")


@pytest.mark.parametrize("case", cases_of("fsdp_wide_job.py"))
def test_eight_ranks(case):
    assert case in held("torchrun", 8, "fsdp_wide_job.py")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_can_be_cut_for_other_shards():
    """A memory's arrays have a value for each element; what is learnt of a shard as a whole starts anew, or is an error."""
    assert _sort_keys(grace_ext.grace("topk(ratio=0.1) + dgc"))[0] == {"residual", "own_momentum"}
    assert _sort_keys(grace_ext.grace("topk(ratio=0.1) + dist_ef_block")) == ({"rated_residual"}, {"residual_rate"})
    assert _sort_keys(grace_ext.grace("powersgd(rank=2) + residual")) == ({"residual"}, set())
    with pytest.raises(UnsupportedError, match="shard_residual"):
        _sort_keys(grace_ext.grace("topk(ratio=0.1) + residual @ reduce_scatter"))


@pytest.mark.parametrize("count", [0, 1, 3, 8, 33])
def test_rows_of_shards(count):
    """fully_shard cuts like torch.chunk, and the last shards may be empty."""
    for shards in (1, 2, 3, 4, 7):
        sizes = [end - first for first, end in (rows_of(shard, shards, count) for shard in range(shards))]
        chunks = [len(chunk) for chunk in torch.arange(count).chunk(shards)] if count else []
        assert sizes == chunks + [0] * (shards - len(chunks))
