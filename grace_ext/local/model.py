"""Local-update training on one rank: computes what is sent at a synchronization, and the model after it. No network, no framework."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from ..driver.layout import checked
from ..driver.state import check_count, read_arrays
from ..errors import GraceError, NamesError, TensorChangedError, few, shown, warn_user
from ..parts.field import HALVES
from ..parts.ops import Array, Ops
from ..parts.tensor import TensorSpec
from .settings import Settings


class LocalModel:
    """Holds one rank's master copy x, the same on all ranks, and how many steps the rank's own model y has made from there.

    At a synchronization of R ranks (Qsparse-local-SGD, Basu et al. 2019, algorithm 1; m_i is the residual of the memory):
        p_i = m_i + x - y_i;   c_i = C(p_i);   m_i <- p_i - c_i                         by the driver, with x - y_i as the gradient
        d = 1/R sum_i c_i;   u <- outer_momentum u + d;   x <- x - outer_lr (d + outer_momentum u);   y_i <- x
    The second line is Nesterov momentum as torch defines it (DiLoCo, Douillard et al. 2023); by default it is x <- x - d. Without
    compression y_i is sent, and d = x - mean y_i: then x <- mean y_i contains no rounding of a difference.
    If any rank's drift is not finite, nothing is applied: all ranks go back to x, with a warning (with CSER they keep their own models).

    Arrays are flat: float64 for float64 parameters, else float32, so that 16-bit parameters have a master copy of full precision. They get
    x rounded, and the drift counts from the rounded values: what rounding lost stays in x.
    """

    def __init__(self, settings: Settings, ops: Ops):
        self.settings, self.ops = settings, ops
        self.specs: dict[str, TensorSpec] = {}  # of the parameters, by name
        self.master: dict[str, Array] = {}
        self.outer: dict[str, Array] = {}  # u
        self.step = self.last = 0  # the number of local steps made, and made before the last synchronization

    @property
    def begun(self) -> bool:
        return bool(self.specs)

    @property
    def drift_specs(self) -> list[TensorSpec]:
        """Describes the tensors that are sent."""
        return [TensorSpec(s.name, s.shape, "float64" if s.dtype == "float64" else "float32") for s in self.specs.values()]

    def begin(self, specs: Iterable[TensorSpec], values: Mapping[str, Any]) -> None:
        """Takes the parameters, before the first local step. If a state was loaded, its master copy is kept. Raises GraceError."""
        if self.begun:
            raise GraceError("this LocalSGD has begun with other weights and keeps their master copy: make a new one to start from these")
        by_name = checked(specs)
        if self.master:
            self._check({"master": self.master, "outer": self.outer}, by_name)
        else:
            self.master = {name: self.ops.copy(self.ops.ingest(values[name])) for name in by_name}
        self.specs = by_name

    def digest(self) -> str:
        """Returns a hash of the master copy, by which ranks check that they start from the same model."""
        hashed = hashlib.blake2b(digest_size=8)
        for name, array in self.master.items():
            hashed.update(name.encode())
            hashed.update(self.ops.host(array).tobytes())
        return hashed.hexdigest()

    # --- steps ------------------------------------------------------------------------------------------------------
    def exchanges_gradients(self) -> bool:
        """Whether the gradients of the next step are exchanged."""
        return self.settings.by_gradients or self.step < self.settings.schedule.start

    def advance(self) -> str:
        """Counts one local step; returns what has to follow it: 'synchronize', 'rebase' (see there), or '' for nothing."""
        averaged = self.exchanges_gradients()
        self.step += 1
        if averaged:
            self.last = self.step
            return "" if self.exchanges_gradients() else "rebase"
        return "synchronize" if self.settings.schedule.due(self.step, self.last) else ""

    def rebase(self, values: Mapping[str, Any]) -> None:
        """Makes the rank's model the new master copy, after the last step with averaged gradients: all ranks have the same model then."""
        self.master = {name: self.ops.copy(self.ops.ingest(values[name])) for name in self.specs}

    def outgoing(self, values: Mapping[str, Any]) -> dict[str, Array]:
        """Returns what the driver exchanges instead of gradients, in the parameters' shapes: x - y, or y if `sends_models`."""
        sent = {}
        for name, spec in self.specs.items():
            self._same(name, values[name])
            mine, master = self.ops.ingest(values[name]), self.master[name]
            given = self.ops.ingest(self.ops.emit(self.ops.copy(master), spec)) if spec.dtype in HALVES else master
            if not self.sends_models:
                mine = given - mine
            elif spec.dtype in HALVES and self.settings.lossless:
                mine = mine + (master - given)
            else:
                mine = self.ops.copy(mine)
            sent[name] = mine.reshape(spec.shape)
        return sent

    @property
    def together(self) -> bool:
        """Whether the rank's model is still the one that all ranks had after the last synchronization."""
        return self.last == self.step and not self.settings.diverges

    @property
    def sends_models(self) -> bool:
        """Whether y is sent instead of x - y: without compression, and with CSER."""
        return self.settings.lossless or self.settings.diverges

    def incoming(self, means: Mapping[str, Any], committed: bool) -> dict[str, Any] | None:
        """Returns the new model in the user's tensors. means: what the driver returned for `outgoing`; committed: whether every rank was
        finite. Returns None if each rank keeps its own model."""
        if not committed and self.settings.diverges:  # CSER keeps no earlier model that all ranks had
            warn_user(
                f"a rank's model was not finite at step {self.step}: no mean is taken, and every rank keeps its own model and its errors"
            )
            return None
        if committed:
            for name in self.specs:
                self.master[name] = self._moved(name, self.ops.ingest(means[name]))
        else:
            warn_user(
                f"a rank's model was not finite at step {self.step}: all ranks go back to the model of step {self.last}, their last "
                "synchronization"
            )
        self.last = self.step
        return self.values()

    def _moved(self, name: str, mean: Array) -> Array:
        x = self.master[name]
        if not self.settings.has_outer:
            return self.ops.copy(mean) if self.sends_models else x - mean
        drift = x - mean if self.sends_models else mean
        momentum, before = self.settings.outer_momentum, self.outer.get(name)
        self.outer[name] = u = drift if before is None else before * momentum + drift
        return x - (drift + u * momentum) * self.settings.outer_lr

    def values(self) -> dict[str, Any]:
        """Returns the master copy as the user's tensors, which share no memory with it."""
        return {name: self.ops.emit(self.ops.copy(self.master[name]), spec) for name, spec in self.specs.items()}

    def _same(self, name: str, tensor: Any) -> None:
        spec, (shape, dtype) = self.specs[name], self.ops.describe(tensor)
        if (shape, dtype) != (spec.shape, spec.dtype):
            raise TensorChangedError(
                f"{name!r} was {spec.dtype}{list(spec.shape)} and is now {dtype}{list(shape)}; the master copy is kept by name, so shapes "
                "and dtypes must not change (make a new LocalSGD for a new model)"
            )

    # --- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Returns {'plan', 'step', 'last', 'arrays': {'master/<parameter>': array, 'outer/<parameter>': array}}, as copies."""
        kept = {"master": self.master, "outer": self.outer}
        arrays = {f"{kind}/{name}": self.ops.copy(array) for kind, of in kept.items() for name, array in of.items()}
        return {"plan": str(self.settings), "step": self.step, "last": self.last, "arrays": arrays}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resumes bit for bit, if the parameters are those of the same moment. Raises GraceError, and changes nothing, if the state does
        not fit."""
        kept = self.read_state(saved)
        self.master, self.outer = kept["master"], kept["outer"]
        self.step, self.last = saved["step"], saved["last"]

    def read_state(self, saved: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
        """Returns copies of a state's arrays by kind and parameter. Raises GraceError if they do not fit."""
        if not isinstance(saved, Mapping) or not {"plan", "step", "last", "arrays"} <= set(saved):
            raise GraceError(f"the model's state must have 'plan', 'step', 'last' and 'arrays', got {shown(saved, 80)}")
        if saved["plan"] != str(self.settings):
            raise GraceError(f"this state was saved by {str(saved['plan'])[:200]}, and this is {self.settings}; they must be the same")
        for key in ("step", "last"):
            check_count(saved, key)
        kept: dict[str, dict[str, Array]] = {"master": {}, "outer": {}}
        for (kind, name), array in read_arrays(self.ops, saved["arrays"]).items():
            if kind not in kept:
                raise GraceError(f"the model's state has {kind!r} of {name!r}; it may have {', '.join(map(repr, kept))}")
            kept[kind][name] = array
        if saved["step"] and not kept["master"]:
            raise GraceError(f"the model's state is that of step {saved['step']}, but lacks the master copy of all parameters")
        if self.specs:
            self._check(kept, self.specs)
        return kept

    def _check(self, kept: dict[str, dict[str, Array]], specs: dict[str, TensorSpec]) -> None:
        """Raises NamesError if the arrays of a state are not of these parameters."""
        expected = {name: (spec.size, "float64" if spec.dtype == "float64" else "float32") for name, spec in specs.items()}
        saved = {kind: {name: (len(x), str(x.dtype).removeprefix("torch.")) for name, x in of.items()} for kind, of in kept.items()}
        master, outer = saved["master"], saved["outer"]
        differing = [name for name in {**expected, **master} if master.get(name) != expected.get(name)]
        if differing:
            raise NamesError(
                f"the saved master copy is of another model: {few(differing)} differ in size or dtype, or are missing: "
                + few(f"{name} is {master.get(name)}, expected {expected.get(name)}" for name in differing[:2])
            )
        if outer and outer != expected:
            differing = [name for name in {**expected, **outer} if outer.get(name) != expected.get(name)]
            raise NamesError(f"the saved outer momentum is of another model: {few(differing)} differ in size or dtype, or are missing")
