"""If ranks disagree or a step fails, every rank gets an error, nothing is committed, and the driver can be used again."""

from __future__ import annotations

from unittest import mock

import pytest

import grace_ext
from grace_ext.driver.driver import Driver
from grace_ext.errors import DisagreementError, GraceError, NamesError, TensorChangedError, UnsupportedDtypeError
from grace_ext.parts.tensor import TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import same_bits

from .hub import OPS, Concatenating, Hub, Native, Poor, step
from .test_driver import SHAPES, SPECS, drivers, run, shuffled, state

CHANGES = {
    "spec": lambda: Driver(grace_ext.grace("topk(ratio=0.3) + residual"), OPS, Native(1, 3), bucket_bytes=1000),
    "seed": lambda: Driver(grace_ext.grace("topk(ratio=0.2) + residual", seed=9), OPS, Native(1, 3), bucket_bytes=1000),
    "divisor": lambda: Driver(grace_ext.grace("topk(ratio=0.2) + residual"), OPS, Native(1, 3), bucket_bytes=1000, divisor=1),
    "bucket_bytes": lambda: Driver(grace_ext.grace("topk(ratio=0.2) + residual"), OPS, Native(1, 3), bucket_bytes=100_000),
}
LISTS = {
    "missing parameter": SPECS[:-1],
    "extra parameter": [*SPECS, TensorSpec("g", (2,))],
    "other shape": [*SPECS[:-1], TensorSpec("f", (301,))],
    "other dtype": [*SPECS[:-1], TensorSpec("f", (300,), "float16")],
    "other order": [SPECS[1], SPECS[0], *SPECS[2:]],
}


@pytest.mark.parametrize("transport", [Native, Poor, Concatenating], ids=lambda t: t.__name__)
@pytest.mark.parametrize("difference", [*CHANGES, *LISTS])
def test_disagreement(difference, transport):
    """If one rank's script differs, all ranks raise before any other collective and no rank hangs; the error names the difference."""
    made = drivers("topk(ratio=0.2) + residual", 3, transport)
    if difference in CHANGES:
        made[1] = CHANGES[difference]()
        made[1].transport = transport(1, 3)
    made[1].register(LISTS.get(difference, SPECS))
    hub = Hub([driver.transport for driver in made])
    gradients = inputs.ranks(3, 0, shapes=SHAPES)
    results = hub.run([step(d, g, [n for n in d.specs if n in g and n not in "fg"]) for d, g in zip(made, gradients, strict=True)])
    assert all(isinstance(result, DisagreementError) for result in results), results
    assert len({str(result) for result in results}) == 1 and all(len(result.by_rank) == 3 for result in results)
    message = str(results[0])
    assert "rank 0" in message and "rank 1" in message and "rank 2" not in message
    if difference == "spec":
        assert "ratio=0.2" in message and "ratio=0.3" in message
    if difference == "seed":
        assert "seed 0" in message and "seed 9" in message
    if difference in LISTS:
        assert {"missing parameter": "f", "extra parameter": "g", "other order": "order"}.get(difference, "f") in message
    assert all(name.startswith("grace/agree") for names in hub.starts for name in names)
    # After the error, a corrected script may go on with the same objects.
    made[1] = drivers("topk(ratio=0.2) + residual", 3, transport)[1]
    results, _ = run(made, gradients, shuffled(3, 0))
    assert same_bits(results[0], results[1])


@pytest.mark.parametrize("where", ["put", "finish"])
def test_an_exception_in_mid_step(where):
    """If every rank fails in the middle of a step, the last committed state remains, and the next step is as if nothing had happened."""
    made, clean = drivers("topk(ratio=0.2) + residual", 2), drivers("topk(ratio=0.2) + residual", 2)
    for group in (made, clean):
        run(group, inputs.ranks(2, 0, shapes=SHAPES), shuffled(2, 0))
    held = [state(driver) for driver in made]
    broken = "fused" if where == "put" else "combine"
    kind = type(made[0].grace.compressor)
    original = getattr(kind, broken)

    def fail(part, ops, *arguments, **more):
        if any(isinstance(a, TensorSpec) and a.name == "b" for a in arguments):
            raise RuntimeError("out of memory, say")
        return original(part, ops, *arguments, **more)

    gradients = inputs.ranks(2, 1, shapes=SHAPES)
    hub = Hub([driver.transport for driver in made])
    with mock.patch.object(kind, broken, fail):
        errors = hub.run([step(d, g, list(reversed(SHAPES))) for d, g in zip(made, gradients, strict=True)])
    assert all(isinstance(error, RuntimeError) for error in errors)
    assert [driver.step for driver in made] == [1, 1]
    assert all(same_bits(a, state(driver)) for a, driver in zip(held, made, strict=True))
    results, _ = run(made, gradients, shuffled(2, 1))
    expected, _ = run(clean, gradients, shuffled(2, 1))
    assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))


def test_a_second_gradient_for_the_same_parameter_is_refused():
    (driver,) = drivers("none", 1)
    gradients = inputs.normal(0, 0, shapes=SHAPES)
    list(driver.put("a", gradients["a"]))
    with pytest.raises(GraceError, match="second gradient for 'a'"):
        list(driver.put("a", gradients["a"]))


def test_what_does_not_fit_is_refused_at_once():
    """`register` rejects duplicate names and wrong dtypes; `put` rejects unknown names, changed shapes and changed dtypes."""
    (driver,) = drivers("none", 1)
    with pytest.raises(NamesError, match="more than once: 'a', 'b'"):
        driver.register([*SPECS, *SPECS[:2]])
    for dtype in ("int64", "bool", "complex64", "float8_e5m2"):
        with pytest.raises(UnsupportedDtypeError, match=f"'w' is {dtype}"):
            driver.register([TensorSpec("w", (3,), dtype)])
    assert list(driver.specs) == list(SHAPES)
    gradients = inputs.normal(0, 0, shapes=SHAPES)
    with pytest.raises(NamesError, match="unknown parameter 'nobody'"):
        list(driver.put("nobody", gradients["a"]))
    with pytest.raises(TensorChangedError, match=r"'a' was float32\[40\] and is now float32\[39\]"):
        list(driver.put("a", gradients["a"][:39]))
    with pytest.raises(TensorChangedError, match=r"now float16\[40\]"):
        list(driver.put("a", gradients["a"].astype("float16")))
    results, _ = run([driver], [gradients], shuffled(1, 0))
    assert same_bits(results[0], gradients)
