"""Tests schedules, and which settings of LocalSGD can be combined."""

from __future__ import annotations

import math

import pytest

from grace_ext.errors import IncompatiblePartsError, ParameterError, UnsupportedError
from grace_ext.local import Schedule, post_local
from grace_ext.local.schedule import schedule_of
from grace_ext.local.settings import settings_of


def steps_of(schedule, until):
    last, found = 0, []
    for step in range(1, until + 1):
        if schedule.due(step, last):
            found.append(step)
            last = step
    return found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [8, 16, 24]),
        ({"every": 7}, [7, 14, 21]),
        ({"schedule": [2, 3, 9]}, [2, 3, 9, 15, 21]),
        ({"schedule": [2, 3], "max_gap": 9}, [2, 3, *range(5, 25, 2)]),
        ({"schedule": lambda step: step == 5, "max_gap": 9}, [5, 14, 23]),
        ({"schedule": post_local(start=10, every=4)}, [14, 18, 22]),
        ({"schedule": Schedule(20, lambda step: step % 6 == 0)}, [6, 12, 18, 24]),
    ],
)
def test_when(given, expected):
    schedule = schedule_of(given.get("every"), given.get("schedule"), given.get("max_gap"))
    assert steps_of(schedule, 24) == expected
    assert all(b - a <= schedule.gap for a, b in zip([schedule.start, *expected], expected, strict=False))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"every": 0}, "every must be a whole number, at least 1 and below 2\\*\\*63, got 0"),
        ({"every": 2.5}, "every"),
        ({"every": True}, "every"),
        ({"every": 4, "schedule": [1]}, "not both"),
        ({"every": 4, "max_gap": 4}, "max_gap"),
        ({"schedule": lambda step: True}, "give max_gap="),
        ({"schedule": []}, "at least one"),
        ({"schedule": [3, 3]}, "must increase"),
        ({"schedule": [0, 3]}, "at least 1 and below 2\\*\\*63, got 0"),
        ({"schedule": [3, 9], "max_gap": 5}, "gap of 6 steps, max_gap is 5"),
        ({"schedule": 3}, "a sequence of steps"),
        ({"outer_lr": 0}, "outer_lr must be a number above 0"),
        ({"outer_momentum": 1.0}, "outer_momentum"),
        ({"timeout": math.nan}, "timeout"),
        ({"max_ahead": -1}, "max_ahead"),
        ({"compression": "topk + cser(reset_period=4)", "every": 8}, "leave out every="),
        ({"compression": "topk + cser", "schedule": [1]}, "leave out every="),
    ],
)
def test_bad_values(given, match):
    with pytest.raises(ParameterError, match=match):
        settings_of(**{"compression": "none", **given})
    with pytest.raises(ParameterError, match="start"):
        post_local(-1)


@pytest.mark.parametrize("option", ["every", "schedule", "max_gap", "max_ahead", "outer_lr", "outer_momentum", "timeout", "asynchronous"])
@pytest.mark.parametrize("value", [10**5000, -(10**5000), "x" * 9999, [10**5000], {}, "no", 1e300, object()], ids=range(8))
def test_errors_name_the_option_and_are_short(option, value):
    """Whatever was given, the error is ours, says what it is about, and repeats at most 200 characters of it."""
    if option == "outer_lr" and value == 1e300:
        return
    options = {"schedule": lambda step: True, "max_gap": value} if option == "max_gap" else {option: value}
    with pytest.raises(ParameterError, match=option) as raised:
        settings_of("topk + residual", **options)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("spec", "options", "match"),
    [
        ("signsgd + none", {}, "has no size"),
        ("signum + none", {}, "has no size"),
        ("topk + dgc", {}, "the momentum of the training"),
        ("topk + gradient_compression", {}, "the momentum of the training"),
        ("efsignsgd + efsignsgd", {}, "multiplies with the learning rate"),
        ("efsignsgd + residual @ reduce_scatter(follow_rate=True)", {}, "follows the learning rate"),
        ("topk + cser", {"outer_lr": 0.5}, "no outer optimizer"),
        ("topk + cser", {"asynchronous": True}, "no asynchronous form"),
        ("powersgd + residual", {"asynchronous": True}, "no common step"),
        ("dqsgd + none", {"asynchronous": True}, "no common step"),
        ("topk + ef21", {"asynchronous": True}, "no common step"),
        ("topk + residual @ sparse_allreduce", {"asynchronous": True}, "needs all ranks at once"),
        ("scaled_int(width=8) + none", {"asynchronous": True}, "needs all ranks at once"),
    ],
)
def test_parts_that_cannot_work_are_refused(spec, options, match):
    with pytest.raises(IncompatiblePartsError, match=match):
        settings_of(spec, **options)


@pytest.mark.parametrize("options", [{"outer_momentum": 0.9}, {"schedule": post_local(4)}])
def test_asynchronous_ranks_have_no_common_step(options):
    with pytest.raises(UnsupportedError, match="all ranks make together"):
        settings_of("none", asynchronous=True, **options)


def test_what_ranks_compare():
    """Settings that must agree have equal texts on all ranks; asynchronous ranks may have different schedules."""
    assert str(settings_of("topk(ratio=0.1) + residual", every=4)) == "LocalSGD(every 4 steps) of topk(ratio=0.1) + residual @ allgather"
    assert str(settings_of("none", schedule=[1, 3])) != str(settings_of("none", schedule=[2, 3]))
    assert str(settings_of("none", schedule=post_local(3))) != str(settings_of("none"))
    assert str(settings_of("none", every=2, asynchronous=True)) == str(settings_of("none", every=3, asynchronous=True))
    assert str(settings_of("none", outer_lr=0.7)) != str(settings_of("none"))
