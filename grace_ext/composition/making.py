"""Makes a Grace from names: reads specs and configurations, fills in defaults, and warns of parts that train badly together."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from ..errors import (
    BiasedCompressorWarning,
    DoubtfulSettingWarning,
    ParameterError,
    SpecSyntaxError,
    UnstableFeedbackWarning,
    few,
    shown,
    warn_user,
)
from ..parts.part import Part
from ..parts.registry import communicators, compressors, mechanisms, memories, policies
from ..parts.spec import parse, part_from
from ..privacy.settings import Privacy
from .composition import Composition, Route
from .grace import Grace

#: What `grace` takes as a spec.
Spec = str | Mapping[str, Any] | Grace | Route | Part
#: The warnings that this process has given: each is given once.
warned: set[str] = set()


def grace(
    spec: Spec | None = None,
    *,
    compressor: Any = None,
    memory: Any = None,
    communicator: Any = None,
    policy: Any = None,
    seed: int | None = None,
) -> Grace:
    """Returns the Grace that a spec names: three parts for all tensors, or a policy.

    spec: a string ('topk(ratio=0.01) + residual @ allgather', 'by_size(large=topk + residual)'), a configuration (`to_config()`), a
      compressor, a composition (`Grace.route`), a policy or a Grace. The parts, or the policy, can be given by keyword instead, as names,
      configurations or instances. Every `compression=` and `g` of the package takes the same.
    The memory defaults to none (with one warning if the compressor needs one), the communicator to the compressor's natural one:
      allreduce if its payloads can be summed, else allgather.
    seed: the base of all randomness, the same on all ranks, except for the noise of privacy.
    Raises UnknownPartError, ParameterError, SpecSyntaxError or IncompatiblePartsError.
    """
    given: dict[str, Any] = {"compressor": compressor, "memory": memory, "communicator": communicator, "policy": policy}
    try:
        return _grace(spec, given, seed)
    except RecursionError:
        raise ParameterError("this spec is nested too deeply to be read; a policy within a policy is about as deep as is useful") from None


def _grace(spec: Spec | None, given: dict[str, Any], seed: int | None) -> Grace:
    if spec is not None:
        if any(value is not None for value in given.values()):
            raise SpecSyntaxError("give a spec, or the parts by keyword, not both")
        if isinstance(spec, Route):
            for leaf in spec.leaves:
                leaf.check()
            return Grace(spec, _seed(seed))
        if isinstance(spec, Part) and spec.kind == "mechanism":
            raise SpecSyntaxError(f"{spec} makes gradients private and names no compressor: write '{spec} | none', or what follows it")
        given, seed = _from_spec(spec.to_config() if isinstance(spec, Grace) else spec, seed)
    private = given.pop("privacy", None)
    privacy = None if private is None else part_from(mechanisms, private)
    assert privacy is None or isinstance(privacy, Privacy)  # the registry holds this one
    if given.get("policy") is None:
        return Grace(compose(**{kind: given.get(kind) for kind in ("compressor", "memory", "communicator")}), _seed(seed), privacy)
    if any(value is not None for kind, value in given.items() if kind != "policy"):
        raise SpecSyntaxError("a policy is a spec by itself: name compressor, memory and communicator in its knobs")
    return Grace(_policy(given["policy"]), _seed(seed), privacy)


def is_spec(value: Any) -> bool:
    """Whether `grace` takes values of this type."""
    return isinstance(value, (str, Mapping, Grace, Route, Part))


def compose(compressor: Any, memory: Any = None, communicator: Any = None) -> Composition:
    """Returns the composition of these parts, checked to fit. Raises as `grace` does."""
    if compressor is None:
        raise SpecSyntaxError("name a compressor, one of: " + ", ".join(compressors.names()))
    chosen: Any = part_from(compressors, compressor)
    natural = "allreduce" if chosen.summable else "allgather"
    remembers: Any = part_from(memories, "none" if memory is None else memory)
    carries: Any = part_from(communicators, natural if communicator is None else communicator)
    result = Composition(chosen, remembers, carries)
    result.check()
    if memory is None and chosen.wants_memory:
        warn_once(
            str(chosen),
            f"{chosen} is biased and has no memory: what it drops is lost, and training may stall. Add error feedback: "
            f"'{chosen} + {chosen.natural_memory}' (or write '+ none' if you mean it)",
            BiasedCompressorWarning,
        )
    if chosen.caution is not None:
        warn_once(f"caution: {chosen}", f"{chosen} {chosen.caution}", DoubtfulSettingWarning)
    omega = chosen.omega(4096) if chosen.unbiased and remembers.feeds_back else None
    if omega is not None and omega >= 1:
        warn_once(
            str(result),
            f"{chosen} is random, with a variance of up to {omega:.3g} times its input: what {remembers.name!r} remembers of it can grow "
            "without bound. Use memory 'none' or 'diana' with it, or a contraction such as 'topk > qsgd'",
            UnstableFeedbackWarning,
        )
    return result


def warn_once(about: str, text: str, category: type[Warning] = UserWarning) -> None:
    """Warns the user, as warn_user does, the first time that it is about this."""
    if about not in warned:
        warned.add(about)
        warn_user(text, category)


def route_from(value: Any) -> Route:
    """Returns the composition or policy that a spec (as `grace` takes it) or an instance stands for; None stands for 'none'."""
    if isinstance(value, Mapping) and "id" in value:
        return _policy(value)
    made = grace("none" if value is None else value)
    if made.seed:
        raise SpecSyntaxError(f"{made!r}: a spec inside a policy has no seed of its own; give it to the outermost grace(...)")
    if made.privacy:
        raise SpecSyntaxError(f"{made!r}: the norm of the whole gradient is clipped, so a mechanism stands in front of the outermost spec")
    return made.route


def _policy(value: Any) -> Route:
    policy = part_from(policies, value)
    assert isinstance(policy, Route)  # the registry holds subclasses of Policy only
    return policy


def _from_spec(spec: Any, seed: int | None) -> tuple[dict[str, Any], int | None]:
    if isinstance(spec, str):
        return dict(parse(spec)), seed
    if isinstance(spec, Part):
        if spec.kind == "compressor":
            return {"compressor": spec}, seed
        raise SpecSyntaxError(f"{spec} is a {spec.kind}, and a spec needs a compressor: grace(compressor=..., {spec.kind}=...)")
    if not is_spec(spec):
        raise SpecSyntaxError(
            f"a spec is a string such as 'topk(ratio=0.01) + residual', a dictionary, a compressor, a composition, a policy or what "
            f"grace_ext.grace(...) returns, got {shown(spec)}"
        )
    unknown = sorted(shown(key, 40) for key in set(spec) - {"compressor", "memory", "communicator", "policy", "seed", "privacy"})
    if unknown:
        raise SpecSyntaxError(
            f"unknown key {few(unknown)}; a configuration has compressor, memory, communicator, seed, or policy, seed, and privacy, if any "
            "(for GRACE's own parameters: grace_ext.from_params(...))"
        )
    return {key: value for key, value in spec.items() if key != "seed"}, spec.get("seed") if seed is None else seed


def _seed(seed: Any) -> int:
    seed = 0 if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or int(seed).bit_length() > 64:
        raise ParameterError(f"seed must be a whole number of at most 64 bits, got {shown(seed)}")
    return int(seed)
