"""Warns of what metrics show, once each, with what to do: an exploding residual, a dead layer, compression that costs more than it saves.

Rank 0 writes the warnings to the log, about what rank 0 sees.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from ..compressors.base import Compressor
from ..driver.driver import Driver
from ..exchange.effects import Effects
from ..exchange.transport import Transport
from ..memories.base import Memory
from ..planning.probe import MeasuredNetwork, Probe
from .recorder import Recorder, TensorWatch

LOG = logging.getLogger("grace_ext")
#: A residual explodes if it exceeds this many times what is allowed: the largest gradient between two looks is not known.
SLACK = 2.0
#: Looks in a row at which a residual must have grown to explode; steps that a judgement of times needs; judgements in a row.
LOOKS, STEPS, TIMES = 3, 8, 2
#: The residual, in gradients, that is allowed if the compressor promises nothing.
WITHOUT_PROMISE = 10.0
#: The part of a gradient that a compressor which loses nothing may leave behind.
ROUNDING = 1e-3
#: Bytes of the collectives that are timed at the first step; larger ones are extrapolated from these.
PROBED = (64, 1 << 18)
DEAD = (
    "the gradient of {!r} has been zero since step {}: a dead layer, which learns nothing. If it is not used, freeze it "
    "(requires_grad=False, trainable=False) before the optimizer is wrapped; else look for a saturated activation, a learning rate that "
    "is too high, or an initialization at zero"
)


def allowed_residual(
    compressor: Compressor, memory: Memory, d: int, gradient: float, lr: float | None, error: float | None = None
) -> float:
    """Returns the largest norm of a residual that theory allows while no gradient is larger than `gradient`.

    For a delta-contraction ||e||^2 <= 4 (1 - delta) / delta^2 G^2 (Karimireddy et al. 2019, lemma 3), for an absolute compressor ||e|| <=
    kappa, where G bounds what a step adds: the gradient, times the learning rate, gamma, and 1 / (1 - momentum), for a memory that has
    these. If the compressor promises neither, delta is 1 - error^2 of the largest relative error seen; if that is no contraction,
    WITHOUT_PROMISE G are allowed."""
    added = gradient * (lr if memory.in_updates and lr is not None else 1) * getattr(memory, "gamma", 1) / _rest(memory)
    kappa, delta = compressor.kappa(d), compressor.delta(d)
    if delta is None and kappa is not None:
        return kappa
    if delta is None:
        delta = 1 - error**2 if error is not None and error < 1 else None
    factor = WITHOUT_PROMISE if delta is None else max(ROUNDING, 2 * math.sqrt(max(0.0, 1 - delta)) / delta)
    return factor * added


def _rest(memory: Memory) -> float:
    momentum: Any = getattr(memory, "momentum", 0)
    return 1 - momentum if isinstance(momentum, float) and momentum < 1 else 1.0


class Adviser(Recorder):
    """Measures one driver, and warns at the end of its steps.

    dead_after: steps of a zero gradient after which a layer is called dead. network: whether collectives cross a real network between the
    ranks, so that its speed may be judged."""

    def __init__(self, driver: Driver, every: int, report: Callable[[Recorder], None], *, dead_after: int, network: bool):
        super().__init__(driver, every, report)
        self._dead_after, self.judges_times = dead_after, network
        self._network: MeasuredNetwork | None = None
        self._told: set[tuple[str, str]] = set()
        #: By name: the largest gradient and relative error, the last residual, and at how many looks in a row it had grown.
        self._seen: dict[str, tuple[float, float, float, int]] = {}
        self._slow = 0

    def probe(self, transport: Transport) -> Effects:
        """Measures plain collectives on the job's own network, on all ranks alike."""
        if transport.size > 1:
            self._network = yield from Probe(transport).collectives(PROBED)

    def finished(self) -> None:
        self._average()
        self._advise()
        self._report(self)

    def _advise(self) -> None:
        for name, watch in self.watches.items():
            if watch.zero_since is not None and self.step - watch.zero_since + 1 >= self._dead_after:
                self._warn("dead", name, DEAD.format(name, watch.zero_since))
            if self.closely and watch.residual is not None and self.driver.committed:
                self._judge_residual(name, watch)
        if not self.closely and self.steps == max(STEPS, self.every - 1):
            self._judge_times()

    def _warn(self, kind: str, about: str, sentence: str) -> None:
        assert self.info is not None
        if self.info.rank == 0 and (kind, about) not in self._told:
            LOG.warning(sentence)
        self._told.add((kind, about))

    def _judge_residual(self, name: str, watch: TensorWatch) -> None:
        error = math.sqrt(watch.error / watch.input) if watch.input > 0 else 0.0
        assert watch.residual is not None and self.info is not None
        gradient, worst, last, growing = self._seen.get(name, (0.0, 0.0, 0.0, 0))
        gradient, worst = max(gradient, watch.gradient or 0.0), max(worst, error)
        growing = 0 if watch.residual <= last else growing + 1
        self._seen[name] = gradient, worst, watch.residual, growing
        compressor, memory, _ = self.driver.parts[name]
        if compressor.whole_model:  # chooses among all tensors: nothing bounds what waits in a single one
            return
        allowed = allowed_residual(compressor, memory, watch.spec.size, gradient, self.info.lr, worst)
        if gradient and growing >= LOOKS and not watch.residual <= SLACK * allowed:
            self._warn("residual", name, (
                f"the residual of {name!r} has a norm of {watch.residual:.3g}, and its gradients one of at most {gradient:.3g}: more than "
                f"{allowed:.3g}, which error feedback with {compressor} should stay below, so it explodes. Use a contraction ('topk', "
                f"'efsignsgd', '{compressor.name}' after 'topk >'), memory 'none' or 'diana' for an unbiased compressor, a leak "
                "(residual(beta=0.9)), or clip the gradients"
            ))  # fmt: skip

    def _judge_times(self) -> None:
        """Compares two exchanges on the network as it was measured. Ours: encoding and decoding as timed, and our collectives. The other:
        an all-reduce of every bucket's gradients. (Times waited would contain other ranks' delays.)"""
        if self._network is None:
            return
        assert self.info is not None
        size, (encode, _, decode) = self.info.size, self.means()
        network = sum(self._network(kind, size, nbytes) for kind, nbytes in self.collectives)
        buckets = self.driver.buckets
        dense = sum(self._network("allreduce", size, sum(spec.nbytes for spec in bucket.specs)) for bucket in buckets)
        ours = encode + network + decode
        self._slow = self._slow + 1 if ours > dense else 0
        if self._slow >= TIMES:
            self._warn("slow", "", (
                f"compression is slower than none here: {1e3 * ours:.3g} ms per step ({1e3 * encode:.3g} to encode, {1e3 * network:.3g} to "
                f"communicate, {1e3 * decode:.3g} to decode), and dense gradients would take about {1e3 * dense:.3g} ms on this network, "
                "as it was measured at the first step. Use 'none' or 'fp16', a cheaper compressor, or policy 'auto', which measures; "
                "`grace-ext plan` compares"
            ))  # fmt: skip
