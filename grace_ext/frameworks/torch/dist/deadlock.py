"""Finds ranks that wait for each other in different collectives, by notes that they leave in the job's store."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch.distributed as dist

from .signature import RULE, Started

#: How many notes there are at most; a later collective's takes the place of an earlier one's.
SLOTS = 64


class DeadlockFinder:
    """One rank's notes and its view of those of the other ranks of its process set."""

    def __init__(self, store: dist.Store, label: str, rank: int):
        self._store: dist.Store | None = store
        self._label, self._rank, self._noted = label, rank, 0

    def look(self, latest: Iterable[Started], advice: str) -> str:
        """Notes the latest collectives that this rank has started. Returns an error's text, the same on all ranks, once one of them has
        found that another rank started something else; else ''. `advice` ends the text."""
        if self._store is None:
            return ""
        try:
            for started in latest:
                if started.number > self._noted:
                    self._noted = started.number
                    self._note(self._store, started, advice)
            return self._store.get("apart").decode() if self._store.check(["apart"]) else ""
        except RuntimeError:
            self._store = None  # the process that serves it has ended, perhaps in good order; if not, the collectives fail as well
            return ""

    def _note(self, store: dist.Store, started: Started, advice: str) -> None:
        number, signature, compared = started
        mine = json.dumps([number, compared, signature.digest().hex(), f"rank {self._rank}: {signature}"])
        slot, there = f"{number % SLOTS}", ""
        while not there or json.loads(there)[0] < number:
            there = store.compare_set(slot, there, mine).decode()
        at, their_compared, their_digest, text = json.loads(there)
        # Two ranks that compare their collectives find out by that, and may go on; the others never meet.
        if at == number and (compared != their_compared or not compared and their_digest != signature.digest().hex()):
            said = f"{text}; rank {self._rank}: {signature}"
            self.tell(f"The ranks wait in different collectives, number {number} of {self._label}. {said}. {RULE}. {advice}")

    def tell(self, text: str) -> None:
        """Gives all ranks this error's text, unless they have one already."""
        if self._store is not None:
            self._store.compare_set("apart", "", text)
