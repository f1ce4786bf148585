"""The problem that a command is about: an example, or an object in a user's file or module, with its data."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_vi_lab.batches import as_tensor, is_array
from pyro_vi_lab.cli.binding import Bound, bind, needed
from pyro_vi_lab.cli.data_files import DataFile, read_data
from pyro_vi_lab.errors import ArgumentError, FileError, LabError, ModelError, unknown_name
from pyro_vi_lab.isolation import model_run, own_params, seeded
from pyro_vi_lab.models import build
from pyro_vi_lab.problem import Problem

Say = Callable[[str], None]
PLAIN_NAMES = ("model", "problem", "<lambda>")
"""Names of objects that say less than that of their file."""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def read_problem(
    text: str, *, data: Path | None = None, device: str | None = None, dtype: str | None = None, say: Say
) -> Problem:
    """The problem that PROBLEM names.

    Args:
        text: A name of ``MODELS``, ``file.py:object`` or ``module:object``.
        data: A file with the model's arguments.
        device: Where to put the data.
        dtype: Type of floating-point data.
        say: Told of what is not used.

    Raises:
        LabError: Anything that is wrong with the model or the data, in words.
    """
    where = _device(device)
    if dtype is not None and dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    kind = None if dtype is None else DTYPES[dtype]
    found = _found(text)
    if data is None:
        made = found if isinstance(found, Problem) else _without_data(found, text)
        return _moved(made, where, kind)
    file = read_data(data)
    model = found.model if isinstance(found, Problem) else found
    bound = bind(model, file, where=text)
    if bound.unused:
        names = ", ".join(bound.unused[:10]) + (", …" if len(bound.unused) > 10 else "")
        say(f"{data}: {file.noun}s that {text} does not ask for: {names}")
    return _with_data(found, bound, file, text, where, kind)


# --- the object -----------------------------------------------------------------------------------------------------


def _found(text: str) -> Any:
    """A problem, a model, or a function that makes one of the two."""
    place, colon, name = text.rpartition(":")
    if colon and place:
        path = Path(place)
        if path.exists() or path.suffix == ".py" or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", place):
            with _model_code(place):
                module = _imported(path)
        else:
            module = _imported_by_name(place)
        return _attribute(module, name, place)
    if text.endswith(".py") or Path(text).is_file():
        raise ArgumentError(f"{text} is a file: name the object in it too, as in {text}:problem")
    return build(text)


def _attribute(module: ModuleType, name: str, place: str) -> Any:
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if isinstance(value, Problem) or _own(module, value)]
        raise unknown_name(f"object in {place}", name, [key for key in known if not key.startswith("_")])
    found = getattr(module, name)
    if isinstance(found, type) or not (isinstance(found, Problem) or callable(found)):
        what = f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__
        raise ArgumentError(
            f"{place}:{name} is {what}, not a pyro_vi_lab.Problem: name a model, or wrap model and data as "
            "pyro_vi_lab.Problem(model, ...)"
        )
    return found


def _own(module: ModuleType, value: object) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _imported(path: Path) -> ModuleType:
    """The module of a file; modules beside it can be imported by it."""
    if not path.is_file():
        raise FileError(f"there is no model file {path} (looked in {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileError(f"{path} is not a Python file; its name has to end in .py")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        with _first_on_path(path.parent):
            spec.loader.exec_module(module)
    finally:
        if before is not None:
            sys.modules[path.stem] = before
    return module


def _imported_by_name(name: str) -> ModuleType:
    with _model_code(name), _first_on_path(Path()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ArgumentError(
                f"there is no module {name} (looked in {Path.cwd()} and in Python's path), and no file {name}"
            ) from error


@contextmanager
def _first_on_path(directory: Path) -> Iterator[None]:
    text = str(directory.absolute())
    sys.path.insert(0, text)
    try:
        yield
    finally:
        sys.path.remove(text)


@contextmanager
def _model_code(place: str) -> Iterator[None]:
    """What the user's file raises, in one line that names its place."""
    try:
        yield
    except LabError:
        raise
    except (Exception, SystemExit) as error:
        where, line = place, ""
        if isinstance(error, SyntaxError) and error.lineno is not None:
            where, line = error.filename or where, f", line {error.lineno}"
        else:
            inside = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
            if inside:
                where, line = inside[-1].filename, f", line {inside[-1].lineno}"
        reason = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        raise ModelError(
            f"model file {place} cannot be used: {type(error).__name__}: {reason or 'no message'} ({where}{line})"
        ) from error


def _is_users(file: str) -> bool:
    ours = os.path.dirname(os.path.dirname(__file__)) + os.sep
    return not (file.startswith((ours, "<frozen")) or "site-packages" in file or f"{os.sep}lib{os.sep}python" in file)


# --- the problem ----------------------------------------------------------------------------------------------------


def _without_data(found: Callable[..., Any], where: str) -> Problem:
    """What a function without arguments makes, or is."""
    names = needed(found)
    if names:
        call = ", ".join([getattr(found, "__name__", "model"), *names])
        raise ArgumentError(
            f"{where} needs arguments ({', '.join(names)}), so it is not a problem yet: give --data FILE, or add a "
            f"line such as problem = pyro_vi_lab.Problem({call}), and name that object"
        )
    with _model_code(where):
        made = _called(found, (), {})
    if isinstance(made, Problem):
        return made
    if _has_samples(found, (), {}, torch.float64):
        return Problem(found, name=_name(found, where))
    raise ArgumentError(
        f"calling {where} gives {type(made).__name__}, not a pyro_vi_lab.Problem, and it has no pyro.sample statement, "
        "so it is no model; it should return pyro_vi_lab.Problem(model, ...)"
    )


def _with_data(
    found: Any, bound: Bound, file: DataFile, where: str, device: torch.device | None, dtype: torch.dtype | None
) -> Problem:
    args, kwargs = _tensors(bound.args, bound.kwargs, device, dtype or torch.float64)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if isinstance(found, Problem):
        return found.with_data(*args, **kwargs, **options)
    if isinstance(found, nn.Module) and device is not None:
        found.to(device)
    failure: Exception | None = None
    made = None
    try:
        made = _called(found, args, kwargs)
    except LabError:
        raise
    except Exception as error:  # noqa: BLE001  # of a model outside of inference, or of a function that makes a problem
        failure = error
    if isinstance(made, Problem):
        return _moved(made, device, dtype)
    if _has_samples(found, args, kwargs, dtype or torch.float64):
        return Problem(found, *args, name=_name(found, where), **kwargs, **options)
    if failure is not None:
        with _model_code(where):
            raise failure
    raise ArgumentError(
        f"{where} with the data of {file.path} gives {type(made).__name__} and has no pyro.sample statement: it is "
        "neither a model nor a function that returns a pyro_vi_lab.Problem"
    )


def _called(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with seeded(None), own_params():
        return function(*args, **kwargs)


def _has_samples(function: Callable[..., Any], args: Any, kwargs: Any, dtype: torch.dtype) -> bool:
    """Whether a function is a model: whether it comes to a sample statement, even if it fails after it."""
    with model_run(seed=0, dtype=dtype, validate=False), poutine.trace() as tracer, suppress(Exception):
        function(*args, **kwargs)
    return any(site["type"] == "sample" for site in tracer.trace.nodes.values())


def _name(found: Any, where: str) -> str:
    """A name for a problem: the model's, or the file's if that says more."""
    own = str(getattr(found, "__name__", type(found).__name__))
    place = where.rpartition(":")[0]
    return place.removesuffix(".py").rpartition(".")[2].rpartition(os.sep)[2] if own in PLAIN_NAMES else own


def _moved(problem: Problem, device: torch.device | None, dtype: torch.dtype | None) -> Problem:
    if device is None and dtype is None:
        return problem
    if isinstance(problem.model, nn.Module) and device is not None:
        problem.model.to(device)
    args, kwargs = _tensors(problem.args, problem.kwargs, device, dtype or problem.dtype)
    return problem.with_data(*args, **kwargs, **({} if dtype is None else {"dtype": dtype}))


def _tensors(args: Any, kwargs: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    return pytree.tree_map(
        lambda leaf: as_tensor(leaf, dtype, device) if isinstance(leaf, Tensor) or is_array(leaf) else leaf,
        (args, kwargs),
    )


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises without CUDA
        reason = (str(error).strip().splitlines() or ["it is not there"])[0]
        raise ArgumentError(f"device {name!r} cannot be used: {reason}; known are cpu, cuda, cuda:0, mps") from error
    return device
