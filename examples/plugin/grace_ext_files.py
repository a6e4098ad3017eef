"""A transport: ranks that share a folder exchange by files in it."""

import time
from pathlib import Path

import numpy as np

from grace_ext.arrays.libraries import ops_for_framework
from grace_ext.exchange.transport import Transport, cut


class FileTransport(Transport):
    """Carries collectives by files: every rank writes its array, and reads those of the others."""

    gathers_uneven = scatters_uneven = True  # it needs no lengths beforehand; what else it lacks, `carry` of the base class supplies

    def __init__(self, folder, rank, size):
        self.folder, self.rank, self.size, self.ops = Path(folder), rank, size, ops_for_framework("numpy")
        self.turns = {}  # by name: how often it came, because names come again

    def start(self, collective, name):
        turn = self.turns[name] = self.turns.get(name, 0) + 1
        place = self.folder / f"{name.replace('/', '_')}.{turn}"
        place.mkdir(parents=True, exist_ok=True)
        if collective.kind == "alltoall":
            for to, piece in enumerate(cut(collective.array, collective.sizes)):
                self.write(place / f"{self.rank}-{to}", piece)
        else:
            self.write(place / f"{self.rank}", collective.array)
        return collective, place

    def wait(self, handle):
        collective, place = handle
        ending = f"-{self.rank}" if collective.kind == "alltoall" else ""
        arrays = [self.read(place / f"{rank}{ending}", collective.array.dtype) for rank in range(self.size)]
        return sum(arrays[1:], arrays[0]) / collective.divisor if collective.kind == "allreduce" else arrays

    def write(self, file, array):
        fresh = file.with_suffix(".new")
        fresh.write_bytes(array.tobytes())
        fresh.rename(file)  # whoever sees the file sees all of it

    def read(self, file, dtype):
        while not file.exists():
            time.sleep(0.001)
        return np.frombuffer(file.read_bytes(), dtype).copy()
