"""Reads the shapes of a model's gradients from a file or from the model itself, as `grace-ext plan MODEL` takes them."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from ..errors import Afterwards, ModelError
from ..parts.tensor import TensorSpec
from .shapes import specs_of

Shapes = dict[str, tuple[int, ...] | TensorSpec]
#: More elements than any model has, and than fit into memory: a larger number is a mistake in the file.
MOST = 10**13
HOW = 'MODEL is a JSON file {"name": [dims...], ...} or module:callable that returns a torch or Keras model'


def shapes_of(model: str) -> Shapes:
    """Returns {parameter: dims, or a TensorSpec if it is not float32} of `model`, the path of a JSON file or 'module:callable'. Raises
    ModelError, which says what is wrong with it. Whatever the user's own code prints goes to stderr."""
    if names_code(model):
        with on_its_own():
            return of_module(model, made(model))
    if Path(model).suffix != ".json" and not Path(model).exists():
        raise ModelError(f"there is no file {model!r}, and it is not module:callable either. {HOW}")
    try:
        document = json.loads(Path(model).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ModelError(f"cannot read {model!r}: {error.strerror}. {HOW}") from None
    except ValueError as error:  # neither JSON nor text
        raise ModelError(f"{model!r} is not JSON: {error}. {HOW}") from None
    return checked(document, repr(model))


def names_code(model: str) -> bool:
    """Whether the text is module:callable."""
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", model)) and not Path(model).exists()


def checked(document: Any, source: str) -> Shapes:
    """Returns the document as shapes. Raises ModelError, which names the entry that is not a shape."""
    if not isinstance(document, Mapping) or not document:
        raise ModelError(f"{source} holds {_short(document)}, expected a dictionary of names and shapes that is not empty. {HOW}")
    shapes: Shapes = {}
    for name, dims in document.items():
        if isinstance(dims, TensorSpec):
            shapes[name] = dims
            continue
        fine = isinstance(dims, (list, tuple)) and all(isinstance(d, int) and not isinstance(d, bool) and d >= 0 for d in dims)
        if not fine:
            raise ModelError(f"{source}: the shape of {name!r} is {_short(dims)}, expected a list of whole numbers, such as [64, 3, 7, 7]")
        shapes[str(name)] = tuple(dims)
    elements = sum(spec.size for spec in specs_of(shapes))
    if not elements:
        raise ModelError(f"{source} has no element in any of its {len(shapes)} tensors: there is nothing to exchange")
    if elements > MOST:
        raise ModelError(f"{source} has {elements:,} elements, which is more than any model has ({MOST:,}): check its shapes")
    return shapes


def made(model: str) -> Any:
    """Returns what module:callable returns; if module:name is itself a model or a dictionary of shapes, returns that."""
    module, _, path = model.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does, so that modules of the current folder are found
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except AttributeError:
        raise ModelError(f"module {module!r} has no {path!r}; it has {_few(vars(sys.modules[module]))}") from None
    except (Exception, SystemExit) as error:  # importing the user's module may run a script, which may fail or exit
        raise ModelError(f"cannot import {module!r} for {model!r}: {type(error).__name__}: {error}") from error
    if isinstance(found, Mapping) or (_is_model(found) and not isinstance(found, type)):
        return found
    if not callable(found):
        raise ModelError(f"{model!r} is {_short(found)}, neither a model nor a callable that returns one")
    try:
        return found()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{model!r}() failed: {type(error).__name__}: {error}; it is called without arguments") from error


@contextmanager
def on_its_own() -> Iterator[None]:
    """Runs the user's code without this command's arguments. Whatever it prints goes to stderr, as stdout may be a JSON document."""
    _flush()
    kept, arguments = os.dup(1), sys.argv
    with Afterwards(lambda: setattr(sys, "argv", arguments), _flush, lambda: os.dup2(kept, 1), lambda: os.close(kept)):
        os.dup2(2, 1)  # for C libraries, which print without Python
        sys.argv = sys.argv[:1]
        with redirect_stdout(sys.stderr):
            yield


def _flush() -> None:
    """Flushes what Python and C have printed, so that it goes to where stdout is now, not to where it is later."""
    for stream in filter(None, (sys.stdout, sys.__stdout__)):
        stream.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


def of_module(source: str, model: Any) -> Shapes:
    """Returns the shapes of the trainable parameters of a torch module or a Keras model, or checks a dictionary of shapes."""
    if isinstance(model, Mapping):
        return checked(model, repr(source))
    if not _is_model(model):
        raise ModelError(f"{source!r} returns {_short(model)}, which is neither a torch module, a Keras model nor a dictionary of shapes")
    try:
        named = _parameters(model)
    except Exception as error:  # torch's lazy modules have parameters without a shape
        raise ModelError(f"{source!r} returns a model whose parameters have no shape yet: {error}; run it once before") from error
    if not named:
        raise ModelError(f"{source!r} returns a model without trainable parameters; a Keras model must be built first: model.build(...)")
    return checked(named, repr(source))


def _is_model(model: Any) -> bool:
    return callable(getattr(model, "named_parameters", None)) or isinstance(getattr(model, "trainable_variables", None), (list, tuple))


def _parameters(model: Any) -> Shapes:
    if isinstance(model, type):
        return {}
    if callable(getattr(model, "named_parameters", None)):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    else:
        named = {f"{i}.{getattr(v, 'path', v.name)}": v for i, v in enumerate(model.trainable_variables)}
    specs = [TensorSpec(name, tuple(map(int, p.shape)), _dtype(p)) for name, p in named.items()]
    return {spec.name: spec.shape if spec.dtype == "float32" else spec for spec in specs}


def _dtype(parameter: Any) -> str:
    """Returns the name of the dtype: torch prints torch.bfloat16, TensorFlow <dtype: 'bfloat16'>, Keras bfloat16."""
    return getattr(parameter.dtype, "name", str(parameter.dtype).removeprefix("torch."))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _few(names: Any) -> str:
    return ", ".join([name for name in names if not name.startswith("_")][:8]) or "nothing"
