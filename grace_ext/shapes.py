"""The shapes of a model's gradients, from a file or from the model itself: what `grace-ext plan MODEL` takes."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ModelError

Shapes = dict[str, tuple[int, ...]]
HOW = 'MODEL is a JSON file {"name": [dims...], ...} or module:callable that gives a torch or Keras model'


def shapes_of(model: str) -> Shapes:
    """{parameter: dims}, of `model`: the path of a JSON file, or 'module:callable'. Raises ModelError, which says what is wrong with it."""
    named = re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)", model)
    if named and not Path(model).exists():
        return of_module(model, _made(model, *named.groups()))
    if Path(model).suffix != ".json" and not Path(model).exists():
        raise ModelError(f"there is no file {model!r}, and it is not module:callable either. {HOW}")
    try:
        document = json.loads(Path(model).read_text())
    except OSError as error:
        raise ModelError(f"cannot read {model!r}: {error.strerror}. {HOW}") from None
    except ValueError as error:  # neither JSON nor text
        raise ModelError(f"{model!r} is not JSON: {error}. {HOW}") from None
    return checked(document, repr(model))


def checked(document: Any, source: str) -> Shapes:
    """The document as shapes. Raises ModelError naming the entry that is none."""
    if not isinstance(document, Mapping) or not document:
        raise ModelError(f"{source} holds {_short(document)}, expected a dictionary of names and shapes that is not empty. {HOW}")
    shapes = {}
    for name, dims in document.items():
        fine = isinstance(dims, (list, tuple)) and all(isinstance(d, int) and not isinstance(d, bool) and d >= 0 for d in dims)
        if not fine:
            raise ModelError(f"{source}: the shape of {name!r} is {_short(dims)}, expected a list of whole numbers, such as [64, 3, 7, 7]")
        shapes[str(name)] = tuple(dims)
    if not any(all(dims) for dims in shapes.values()):
        raise ModelError(f"{source} has no element in any of its {len(shapes)} tensors: there is nothing to exchange")
    return shapes


def _made(model: str, module: str, path: str) -> Any:
    """What module:callable gives; a model or a dictionary of shapes that is there already is taken as it is."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: modules of the current folder
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except AttributeError:
        raise ModelError(f"module {module!r} has no {path!r}; it has {_few(vars(sys.modules[module]))}") from None
    except Exception as error:  # whatever the user's module does when it is imported
        raise ModelError(f"cannot import {module!r} for {model!r}: {type(error).__name__}: {error}") from error
    if isinstance(found, Mapping) or (_parameters(found) is not None and not isinstance(found, type)):
        return found
    if not callable(found):
        raise ModelError(f"{model!r} is {_short(found)}, neither a model nor a callable that gives one")
    try:
        return found()
    except Exception as error:
        raise ModelError(f"{model!r}() failed: {type(error).__name__}: {error}; it is called without arguments") from error


def of_module(source: str, model: Any) -> Shapes:
    """The shapes of the parameters that train: of a torch module, a Keras model, or a dictionary of shapes."""
    if isinstance(model, Mapping):
        return checked(model, repr(source))
    named = _parameters(model)
    if named is None:
        raise ModelError(f"{source!r} gives {_short(model)}, which is neither a torch module, a Keras model nor a dictionary of shapes")
    if not named:
        raise ModelError(f"{source!r} gives a model without parameters that train; a Keras model must be built first: model.build(...)")
    return checked(named, repr(source))


def _parameters(model: Any) -> dict[str, tuple[int, ...]] | None:
    """None where it is no model."""
    if callable(getattr(model, "named_parameters", None)):
        return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad} if not isinstance(model, type) else {}
    variables = getattr(model, "trainable_variables", None)
    if isinstance(variables, (list, tuple)):
        return {f"{i}.{getattr(v, 'path', v.name)}": tuple(map(int, v.shape)) for i, v in enumerate(variables)}
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _few(names: Any) -> str:
    return ", ".join([name for name in names if not name.startswith("_")][:8]) or "nothing"
