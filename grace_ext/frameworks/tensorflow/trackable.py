"""Makes the memory of compression a part of TensorFlow's checkpoints."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ...checkpoints.statefile import decode, driver_states, encode


class TrackedState(tf.train.experimental.PythonState):
    """Gives tf.train.Checkpoint the state of an optimizer's or tape's exchange: this rank's, as the bytes of a safetensors file. It is
    restored with the optimizer, also before the first step."""

    def __init__(self, exchange: Any):
        self._exchange = exchange

    def serialize(self) -> bytes:
        return encode(self._exchange._saveable().read()[0])

    def deserialize(self, string_value: bytes) -> None:
        kept, state = self._exchange._saveable(), decode(string_value)
        if any(driver_states(state)):
            kept.check([state])
            kept.write([state])
