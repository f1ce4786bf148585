"""What a run of Python code read besides its arguments, so that a captured graph is not used once it has changed."""

from __future__ import annotations

import copy
import dis
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vi_lab.user_errors import is_users

_SIMPLE = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, tuple, dict, set, frozenset)
_OF_TORCH = frozenset(vars(nn.Module()))
MAX_DEPTH = 4
"""How far attributes of attributes are followed."""
MAX_ITEMS = 1000
"""Containers of tensors and other objects with more items are watched by their length alone: comparing them at every
call would take too long."""


class Guards:
    """The globals, closed-over variables, attributes and containers that functions refer to, with their contents.

    Follows the code of ``functions`` and of the user's functions that they name, the objects that methods are bound
    to, and the modules. What simple values, lists, dictionaries and sets hold is compared; tensors, functions, modules
    and other objects are compared by identity.

    Args:
        functions: Functions, methods, modules or other callables.
        modules: Modules that have been run.

    Attributes:
        modules: All modules found, submodules among them.
        tensors: All tensors found, by id, that are no parameters or buffers of modules.
    """

    def __init__(self, functions: Iterable[Any], modules: Iterable[nn.Module] = ()) -> None:
        self.modules: list[nn.Module] = []
        self.tensors: dict[int, Tensor] = {}
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # so that no id is used again
        self._names: dict[int, tuple[Mapping[str, Any], str, set[str]]] = {}
        self._cells: list[tuple[types.CellType, Any, str]] = []
        self._contents: list[tuple[Any, Any, str]] = []
        self._plain: list[tuple[Any, Any, str]] = []  # that hold simple values alone
        self._versions: list[tuple[Tensor, int]] = []
        for value in (*functions, *modules):
            self._visit(value, _name_of(value), 0)
        self._modes = [(module, module.training) for module in self.modules]
        self._variables = [_Variables(*watched) for watched in self._names.values()]

    def watch_values(self, constants: Iterable[Tensor], *, except_for: Iterable[Tensor]) -> None:
        """Watch that ``constants`` and the tensors found are not written into, except for those that may be."""
        ignored = {id(tensor) for tensor in except_for}
        watched = {**self.tensors, **{id(tensor): tensor for tensor in constants}}
        self._versions = [(value, value._version) for key, value in watched.items() if key not in ignored]

    def changed(self) -> str:
        """What has changed; empty if nothing has."""
        for module, training in self._modes:
            if module.training is not training:
                return f"the mode of {type(module).__name__} (train or eval)"
        for variables in self._variables:
            if variables.differ():
                return variables.changed()
        for cell, value, name in self._cells:
            if cell.cell_contents is not value and _differs(cell.cell_contents, value):
                return name
        for tensor, version in self._versions:
            if tensor._version != version:
                return f"a tensor of shape {tuple(tensor.shape)} that is no argument and was written in place"
        for container, before, label in self._plain:
            if _unequal(container, before):
                return f"the contents of {label}"
        for container, content, label in self._contents:
            if _content(container) != content:
                return f"the contents of {label}"
        return ""

    # --- finding ------------------------------------------------------------------------------------------------------

    def _visit(self, value: Any, label: str, depth: int) -> None:
        if isinstance(value, _SIMPLE) or depth > MAX_DEPTH or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._alive.append(value)
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
        elif isinstance(value, types.MethodType):
            self._visit(value.__self__, _name_of(value.__self__), depth)
            self._visit_code(value.__func__, depth, owner=value.__self__)
        elif isinstance(value, partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._visit(part, label, depth)
        elif isinstance(value, types.FunctionType):
            self._visit_code(value, depth)
        elif isinstance(value, nn.Module):
            self._visit_module(value, depth)
        elif isinstance(value, _CONTAINERS):
            self._visit_container(value, label, depth)
        elif _holds_settings(value):
            self._visit_object(value, depth)

    def _visit_code(self, function: Any, depth: int, owner: Any = None) -> None:
        function = inspect.unwrap(function)
        if not isinstance(function, types.FunctionType) or not is_users(function.__code__.co_filename):
            return
        self._alive.append(function)
        names, attributes = _read_by(function.__code__)
        for name in names & function.__globals__.keys():
            value = function.__globals__[name]
            if isinstance(value, types.ModuleType):
                self._visit_namespace(value, attributes, depth)
            else:
                self._watch(function.__globals__, "", name, value, depth)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            self._cells.append((cell, value, name))
            self._visit(value, name, depth + 1)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(value, f"a default of {function.__name__}", depth + 1)
        for name in attributes if owner is not None else ():
            method = inspect.getattr_static(type(owner), name, None)
            method = method.fget if isinstance(method, property) else method
            if isinstance(method, types.FunctionType) and id(method) not in self._seen:
                self._seen.add(id(method))
                self._visit_code(method, depth, owner=owner)

    def _visit_namespace(self, module: types.ModuleType, attributes: set[str], depth: int) -> None:
        if is_users(getattr(module, "__file__", None) or "<frozen"):
            for name in attributes & vars(module).keys():
                self._watch(vars(module), f"{module.__name__}.", name, vars(module)[name], depth)

    def _visit_module(self, root: nn.Module, depth: int) -> None:
        for module in root.modules():
            if module is not root and id(module) in self._seen:
                continue
            self._seen.add(id(module))
            self._alive.append(module)
            self.modules.append(module)
            users = _is_users_class(type(module))
            for name, value in vars(module).items():
                if name not in _OF_TORCH and not name.startswith("_pyro_") and (users or isinstance(value, _SIMPLE)):
                    self._watch(vars(module), f"{type(module).__name__}.", name, value, depth)
            for name, child in module._modules.items():
                self._watch(module._modules, f"{type(module).__name__}.", name, child, MAX_DEPTH)  # visited by itself
            self._visit_code(type(module).forward, depth, owner=module)

    def _visit_object(self, value: Any, depth: int) -> None:
        for name, attribute in vars(value).items():
            self._watch(vars(value), f"{type(value).__name__}.", name, attribute, depth)
        if callable(value):
            self._visit_code(type(value).__call__, depth, owner=value)

    def _visit_container(self, value: Any, label: str, depth: int) -> None:
        items = value.values() if isinstance(value, dict) else value
        if not isinstance(value, (tuple, frozenset)):
            plain = all(isinstance(item, _SIMPLE) for item in items)
            (self._plain if plain else self._contents).append(
                (value, copy.copy(value) if plain else _content(value), label)
            )
        if len(value) <= MAX_ITEMS:
            for item in tuple(items):
                self._visit(item, label, depth + 1)

    def _watch(self, variables: Mapping[str, Any], prefix: str, name: str, value: Any, depth: int) -> None:
        self._names.setdefault(id(variables), (variables, prefix, set()))[2].add(name)
        self._visit(value, prefix + name, depth + 1)


class _Variables:
    """Some entries of a namespace: the simple ones compared by value, the others by identity."""

    def __init__(self, variables: Mapping[str, Any], prefix: str, names: Iterable[str]) -> None:
        self.variables, self.prefix = variables, prefix
        self.before = {name: variables[name] for name in names}
        simple = [name for name, value in self.before.items() if isinstance(value, _SIMPLE)]
        others = [name for name in self.before if name not in simple]
        self._simple, self._values = _getter(simple), [self.before[name] for name in simple]
        self._others, self._ids = _getter(others), [id(self.before[name]) for name in others]

    def differ(self) -> bool:
        """Whether any has changed."""
        try:
            return self._values != [*self._simple(self.variables)] or self._ids != [
                *map(id, self._others(self.variables))
            ]
        except (KeyError, RuntimeError, TypeError, ValueError):  # gone, or now something that cannot be compared
            return True

    def changed(self) -> str:
        """Name of the first that has."""
        missing = object()
        for name, value in self.before.items():
            if _differs(self.variables.get(name, missing), value):
                return self.prefix + name
        return self.prefix.rstrip(".")


def _getter(names: Sequence[str]) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    if len(names) > 1:
        return itemgetter(*names)
    return (lambda variables: (variables[names[0]],)) if names else (lambda variables: ())


def _differs(now: Any, value: Any) -> bool:
    if now is value:
        return False
    return not (isinstance(value, _SIMPLE) and isinstance(now, _SIMPLE) and bool(now == value))


def _unequal(now: Any, before: Any) -> bool:
    try:
        return bool(now != before)
    except (RuntimeError, TypeError, ValueError):  # now something that cannot be compared
        return True


def _content(value: Any) -> Any:
    """Something that equals itself as long as the container holds the same."""
    if len(value) > MAX_ITEMS:
        return len(value)
    if isinstance(value, dict):
        return [(key, _item(item)) for key, item in value.items()]
    return frozenset(map(_item, value)) if isinstance(value, set) else [*map(_item, value)]


def _item(item: Any) -> Any:
    if isinstance(item, _SIMPLE):
        return (type(item), item)
    if isinstance(item, (list, dict, set)):
        return (type(item), _content(item))
    return id(item)


def _name_of(value: Any) -> str:
    return str(getattr(value, "__name__", type(value).__name__))


def _holds_settings(value: Any) -> bool:
    """Whether an object is one of the user's, or a bag of names such as a parser of arguments gives."""
    bag = type(value).__name__.endswith("Namespace")
    return hasattr(value, "__dict__") and (bag or _is_users_class(type(value)))


def _is_users_class(kind: type) -> bool:
    try:
        return is_users(inspect.getfile(kind))
    except TypeError:  # built in, or made at the prompt
        return kind.__module__ == "__main__"
    except OSError:  # made in a notebook
        return True


def _read_by(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Names of the globals, and of the attributes, that a function's code and the functions inside it read."""
    names, attributes = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            attributes.add(instruction.argval)
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            inner_names, inner_attributes = _read_by(part)
            names |= inner_names
            attributes |= inner_attributes
    return names, attributes


@contextmanager
def modules_run() -> Iterator[list[nn.Module]]:
    """Collects every module that is called inside the block."""
    found: dict[int, nn.Module] = {}
    modules: list[nn.Module] = []

    def remember(module: nn.Module, args: Any) -> None:
        found.setdefault(id(module), module)

    handle = nn.modules.module.register_module_forward_pre_hook(remember)
    try:
        yield modules
    finally:
        handle.remove()
        modules.extend(found.values())
