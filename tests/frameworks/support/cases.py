"""Runs the `case_*` functions of a job file on all ranks, and prints 'CASE name ok' for each that held on every rank."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grace_ext


def raises(kind: type[Exception] | tuple[type[Exception], ...], text: str, call: Any) -> None:
    """Asserts that the call raises this error, or one of these, with this text in it."""
    try:
        call()
    except kind as error:
        assert text in str(error), f"{text!r} is not in {error}"
    else:
        raise AssertionError(f"no {kind}")


def warnings_of(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    """Returns the warnings for users that the call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if w.category is UserWarning]


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Yields the list that gets the messages that grace_ext logs inside."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("grace_ext").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("grace_ext").removeHandler(handler)


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Asserts that two models' weights (numpy arrays by name) have the same bits."""
    for name in other:
        assert one[name].tobytes() == other[name].tobytes(), name


def run_cases(hvd: Any, names: Mapping[str, Any]) -> None:
    """Runs all cases, or those named on the command line; on a single rank `alone`, if the job has it, which reports by itself."""
    if "alone" in names and hvd.size() == 1:  # engines of jobs without it need no size
        names["alone"]()
        return
    chosen = sys.argv[1:] or [name for name in names if name.startswith("case_")]
    for name, case in [(name, names[name]) for name in chosen]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", category=grace_ext.errors.BiasedCompressorWarning)
                warnings.filterwarnings("ignore", category=grace_ext.errors.UnstableFeedbackWarning)
                warnings.filterwarnings("ignore", module="torch|tensorflow|keras|horovod")
                case()
            held = True
        except Exception:
            print(f"CASE {name} failed on rank {hvd.rank()}:\n{traceback.format_exc()}", flush=True)
            held = False
        if all(hvd.allgather_object(held)) and hvd.rank() == 0:
            print(f"CASE {name} ok", flush=True)
