"""Makes a Grace from GRACE's own parameter dictionary."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from .. import communicators, compressors, memories
from ..errors import ParameterError, few, shown, warn_user
from .grace import Grace
from .making import grace, warn_once

# GRACE's keys -> (kind, our knob), for the parts that have such a knob.
PARAMS = {
    "compress_ratio": ("compressor", "ratio"),
    "compress_rank": ("compressor", "rank"),
    "quantum_num": ("compressor", "levels"),
    "bucket_size": ("compressor", "bucket"),
    "threshold": ("compressor", "threshold"),
    "quantiles": ("compressor", "quantiles"),
    "error_bound": ("compressor", "bound_exponent"),
    "momentum_factor": ("compressor", "momentum"),
    "momentum": ("memory", "momentum"),
    "gradient_clipping": ("memory", "clipping"),
    "lr": (None, None),  # ours read the optimizer's current rate at every step
    "world_size": (None, None),  # known from the engine
    "kernel": (None, None),  # by which program GRACE's topk finds the same elements
}

#: GRACE's names of parts that have other names here, by kind. Its *_cuda compute the same on a GPU.
NAMES = {
    "compressor": {"qsgd_cuda": "qsgd", "natural_cuda": "natural", "adapsparse": "wangni", "AdapSparse": "wangni"},
    "communicator": {"all_to_all": "reduce_scatter", "alltoall": "reduce_scatter"},
}


def _renamed(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that are called something else here."""
    named = {kind: value for kind, value in params.items() if kind in NAMES and isinstance(value, str)}
    changed: dict[str, Any] = {kind: NAMES[kind][value] for kind, value in named.items() if value in NAMES[kind]}
    clipping = params.get("gradient_clipping")
    if clipping is False:
        changed["gradient_clipping"] = None
    elif clipping is True:
        raise ParameterError("gradient_clipping: give the norm that gradients of the whole model are rescaled to (times sqrt(n)), not True")
    if "error_bound" in params:
        changed["error_bound"] = _exponent(params["error_bound"])
    factor = params.get("momentum_factor")
    given = factor is not None and not (isinstance(factor, numbers.Real) and not factor)
    if given and params.get("compressor") != "signum":
        warn_user("from_params: momentum_factor has no effect; give the momentum to the optimizer")
    return changed


def _exponent(bound: Any) -> int:
    """Returns E of GRACE's 'error_bound' 2e-E, which stands for 2**-E."""
    try:
        return round(-math.log10(float(bound) / 2))
    except (TypeError, ValueError, OverflowError):
        raise ParameterError(f"error_bound must be a number like 2e-10 (for 2**-10), got {shown(bound)}") from None


def from_params(params: Mapping[str, Any]) -> Grace:
    """Returns the Grace that GRACE's own parameter dictionary describes, e.g. {'compressor': 'topk', 'memory': 'residual', 'communicator':
    'allgather', 'compress_ratio': 0.01}. It takes the keys and names of all GRACE's helpers (torch, dist, tensorflow). A missing key takes
    the default of grace_ext, which one warning names; `lr` and `world_size` are read from the optimizer and the engine."""
    if not isinstance(params, Mapping):
        raise ParameterError(
            f"GRACE parameters are a dictionary such as {{'compressor': 'topk', 'memory': 'residual'}}, got {shown(params)}"
        )
    params = {**params, **_renamed(params)}
    known = {"compressor", "memory", "communicator", *PARAMS}
    unknown = sorted(shown(key, 40) for key in set(params) - known)
    if unknown:
        raise ParameterError(f"unknown key {few(unknown)} in GRACE parameters; known: {', '.join(sorted(known))}")
    kinds = {"compressor": compressors, "memory": memories, "communicator": communicators}
    classes = {kind: module.get(params[kind]) for kind, module in kinds.items() if params.get(kind) is not None}
    if "compressor" not in classes:
        raise ParameterError("GRACE parameters need a 'compressor', one of: " + ", ".join(compressors.names()))
    knobs: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for key, value in params.items():
        kind, name = PARAMS.get(key, (None, None))
        # GRACE's dictionary is shared by all its parts: 'momentum' is also signum's, and keys of parts not in use are ignored.
        for candidate in [kind, "compressor"] if key == "momentum" else [kind]:
            if candidate in classes and name in {f.name for f in dataclasses.fields(classes[candidate])}:
                knobs[candidate][name] = value
                break
    defaults = {
        f"{kind} {cls.name}: {f.name}={f.default!r}"
        for kind, cls in classes.items()
        for f in dataclasses.fields(cls)
        if f.name not in knobs[kind] and f.name in {ours for _, ours in PARAMS.values()}
    }
    if defaults:
        listed = ", ".join(sorted(defaults))
        warn_once(listed, f"from_params: keys that are missing take grace_ext's defaults: {listed}")
    parts = {kind: cls.create((), knobs[kind]) for kind, cls in classes.items()}
    return grace(**parts)
