"""Tests `Privacy` and the spec prefix: what is read, what comes back, what is refused and why."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from grace_ext import LocalCluster, grace
from grace_ext.cli.catalogue import describe
from grace_ext.errors import GraceError, IncompatiblePartsError, ParameterError, SpecSyntaxError, UnknownPartError, UnsupportedError
from grace_ext.local.settings import settings_of
from grace_ext.parts.spec import named_by
from grace_ext.privacy import Privacy
from grace_ext.privacy.settings import check_protects_ranks

BY_EXAMPLES = "unit='example', sample_rate=0.1, batch=8"


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("gaussian(clip=1, noise_multiplier=1.1) | topk(ratio=0.01) + residual",
         "gaussian(clip=1.0, noise_multiplier=1.1) | topk(ratio=0.01) + residual @ allgather"),
        ("gaussian(2, 0.5)|topk>qsgd(bits=4)+residual@allgather",
         "gaussian(clip=2.0, noise_multiplier=0.5) | topk(ratio=0.01) > qsgd(bits=4) + residual @ allgather"),
        (f"gaussian({BY_EXAMPLES}, support=0.1) | powersgd + residual",
         "gaussian(clip=1.0, noise_multiplier=1.0, sample_rate=0.1, unit='example', support=0.1, batch=8.0) | "
         "powersgd(rank=2) + residual @ allreduce"),
        ("gaussian(trust='sum') | none", "gaussian(clip=1.0, noise_multiplier=1.0, trust='sum') | none @ allreduce"),
        ("gaussian | by_size(large=topk + residual, small=none)",
         "gaussian(clip=1.0, noise_multiplier=1.0) | by_size(min_elements=1024, small=none @ allreduce, "
         "large=topk(ratio=0.01) + residual @ allgather)"),
    ],
)  # fmt: skip
def test_the_prefix_reads_back(text, meaning):
    """From its text and from its configuration, which is JSON; and the privacy is not part of the route."""
    made = grace(text)
    assert str(made) == meaning and grace(meaning) == made
    assert grace(json.loads(json.dumps(made.to_config()))) == made
    assert made.privacy is not None and made.to_config()["privacy"]["id"] == "gaussian"
    assert grace(str(made.route)) != made and grace(str(made.route)).with_privacy(made.privacy) == made


def test_a_spec_without_prefix_has_the_configuration_that_it_had():
    assert "privacy" not in grace("topk + residual").to_config() and grace("topk + residual").privacy is None


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("gaussian | gaussian | topk", SpecSyntaxError, "cannot read 'gaussian | gaussian'"),
        ("gauss | topk", UnknownPartError, "no mechanism named 'gauss'; did you mean 'gaussian'"),
        ("topk | none", UnknownPartError, "no mechanism named 'topk'"),
        ("by_size(large='gaussian | topk + residual')", ParameterError, "stands in front of the outermost spec"),
        ("gaussian(support=topk) | none", ParameterError, "support that depends on the data"),
        ("gaussian(support=0) | none", ParameterError, r"support must be a number in \(0, 1\]"),
        ("gaussian(clip=0) | none", ParameterError, "clip must be"),
        ("gaussian(noise_multiplier=-1) | none", ParameterError, "noise_multiplier must be"),
        ("gaussian(sample_rate=0.5) | none", ParameterError, "sample_rate and batch are for unit='example'"),
        ("gaussian(batch=5) | none", ParameterError, "sample_rate and batch are for unit='example'"),
        ("gaussian(unit='example') | none", ParameterError, "needs batch, the expected number of examples"),
        ("gaussian(unit='step') | none", ParameterError, "unit must be one of 'rank', 'example'"),
        *[(f"gaussian(trust='sum') | {spec}", IncompatiblePartsError, "trust='sum'.*use 'none @ allreduce'")
          for spec in ("topk + residual", "none @ allgather", "randomk + none", "powersgd + residual", "fp16",
                       "by_size(large=none, small=none)", "none @ hierarchical")],
    ],
)  # fmt: skip
def test_what_is_refused(text, error, words):
    with pytest.raises(error, match=words):
        grace(text)


def test_settings_are_given_once():
    one, other = Privacy(clip=1), Privacy(clip=2)
    assert grace("none").with_privacy(one).with_privacy(one) == grace(f"{one} | none")
    with pytest.raises(SpecSyntaxError, match="give one of them"):
        grace(f"{one} | none").with_privacy(other)
    with pytest.raises(SpecSyntaxError, match="names no compressor"):
        grace(one)
    with pytest.raises(ParameterError, match="privacy must be Privacy"):
        LocalCluster("none", 2, privacy="gaussian")
    assert dataclasses.replace(one, clip=2.0) == other and hash(other) == hash(Privacy(clip=2))


def test_wrappers_that_see_whole_gradients_refuse_to_protect_examples():
    with pytest.raises(UnsupportedError, match="a hook gets one gradient per rank"):
        check_protects_ranks(grace(f"gaussian({BY_EXAMPLES}) | none").privacy, "a hook")


def test_local_sgd_refuses():
    with pytest.raises(UnsupportedError, match="LocalSGD makes steps with gradients that are not"):
        settings_of("gaussian | topk + residual", every=4)


def test_ranks_must_agree_and_a_state_belongs_to_its_settings():
    """The settings are a part of the spec, so the agreement of the first step and the checks of states compare them."""
    cluster, other = LocalCluster("gaussian | none", 2), LocalCluster("gaussian(clip=2) | none", 2)
    for each in (cluster, other):
        each.step([{"w": np.ones(3, np.float32)}] * 2)
    assert cluster.drivers[0]._described()["spec"] != other.drivers[0]._described()["spec"]
    with pytest.raises(GraceError, match="this state was saved with 'gaussian"):
        other.load_state_dict(cluster.state_dict())
    lacking = cluster.state_dict()
    del lacking["ranks"][1]["releases"]
    with pytest.raises(GraceError, match="rank 1: this state lacks 'releases'"):
        cluster.load_state_dict(lacking)


def test_the_sample_of_a_step_is_poisson():
    """Sizes vary as a binomial's do, empty samples included; and nothing repeats."""
    privacy = Privacy(unit="example", sample_rate=0.02, batch=1)
    sizes = [len(privacy.sample(50)) for _ in range(2000)]
    assert 0.9 < np.mean(sizes) < 1.1 and 0.85 < np.var(sizes) < 1.15 and 0 in sizes
    drawn = privacy.sample(100_000)
    assert (np.diff(drawn) > 0).all() and not np.array_equal(drawn, privacy.sample(100_000))


def test_the_command_show_describes_it():
    """By its name, and as a part of a spec."""
    (alone,) = [describe(part) for part in named_by("gaussian")]
    assert alone["kind"] == "mechanism" and [knob["name"] for knob in alone["knobs"]][:2] == ["clip", "noise_multiplier"]
    whole = [describe(part)["spec"] for part in named_by("gaussian(clip=2) | topk(ratio=0.5) + residual")]
    assert whole == ["gaussian(clip=2.0, noise_multiplier=1.0)", "topk(ratio=0.5)", "residual"]
