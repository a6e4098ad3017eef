"""Loads saved Keras models, whose optimizer is then a wrapped one again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import keras

from ...errors import UnsupportedError
from .optimizer import DistributedOptimizer


def load_model(
    filepath: Any,
    custom_optimizers: Iterable[type] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    compression: Any = None,
    **options: Any,
) -> Any:
    """Loads a Keras model, and wraps its optimizer (with its saved state) in a DistributedOptimizer, as horovod.keras.load_model does.

    Saved models name the plain optimizer, so that they load without grace_ext; keras.models.load_model gives that.
    custom_optimizers: classes of optimizers that Keras does not know. custom_objects: as for keras.models.load_model.
    compression, options: as for DistributedOptimizer. The memory of compression is not in the model's file; see grace_ext.load.
    """
    objects = {kind.__name__: kind for kind in custom_optimizers or ()} | dict(custom_objects or {})
    model = keras.models.load_model(filepath, custom_objects=objects)
    if getattr(model, "optimizer", None) is not None:
        model.optimizer = DistributedOptimizer(model.optimizer, compression=compression, **options)
    return model


def SyncBatchNormalization(*_: Any, **__: Any) -> NoReturn:  # noqa: N802 (Horovod's name)
    """Raises UnsupportedError: Horovod's layer was made for Keras 2 and does not work in Keras 3."""
    raise UnsupportedError(
        "Horovod's SyncBatchNormalization does not work in Keras 3. Use keras.layers.BatchNormalization, which normalizes each rank's own "
        "batch, or keras.layers.GroupNormalization, which does not depend on the batch"
    )
