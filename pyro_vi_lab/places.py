"""Where parameters and buffers live, so that a graph finds those of today."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance
from torch import Tensor, nn


class Places:
    """Tensors, and the entries of the param store and of modules that they were found in.

    Args:
        tensors: The tensors.
        modules: All modules that may hold them, submodules among them.
        fixed: Which of the tensors must stay the same objects.

    Attributes:
        tensors: The present tensors, in the same order.
    """

    def __init__(self, tensors: Sequence[Tensor], modules: Sequence[nn.Module], fixed: Container[int] = ()) -> None:
        self.tensors, self._fixed = list(tensors), fixed
        number = {id(tensor): position for position, tensor in enumerate(tensors)}
        store = pyro.get_param_store()
        self._stored = [(number[id(value)], name) for name, value in store._params.items() if id(value) in number]
        self._owned = [
            (number[id(value)], mapping, name)
            for module in modules
            for mapping in (module._parameters, module._buffers)
            for name, value in mapping.items()
            if id(value) in number
        ]
        self._requires = [(tensor, tensor.requires_grad) for tensor in tensors]

    def moved(self) -> bool:
        """Whether any tensor is not where it was."""
        tensors, params = self.tensors, pyro.get_param_store()._params
        for number, name in self._stored:
            if params.get(name) is not tensors[number]:
                return True
        for number, mapping, name in self._owned:
            if mapping.get(name) is not tensors[number]:
                return True
        return any(tensor.requires_grad is not requires for tensor, requires in self._requires)

    def follow(self) -> str:
        """Take the tensors that are there now; says which one cannot be taken, empty if all can."""
        present: dict[int, Tensor] = {}
        params = pyro.get_param_store()._params
        places = [(number, params.get(name), name) for number, name in self._stored]
        places += [(number, mapping.get(name), name) for number, mapping, name in self._owned]
        for number, tensor, name in places:
            if number in self._fixed and tensor is not self.tensors[number]:
                return f"{name!r}"
            if tensor is None or present.setdefault(number, tensor) is not tensor:
                return f"parameter {name!r}"
            before, requires = self._requires[number]
            if _signature(tensor) != _signature(before) or tensor.requires_grad is not requires:
                return f"the shape, the type or requires_grad of {name!r}"
        if any(
            tensor.requires_grad is not requires
            for number, (tensor, requires) in enumerate(self._requires)
            if number not in present
        ):
            return "requires_grad of a tensor"
        for number, tensor in present.items():
            self.tensors[number] = tensor
        self._requires = [
            (tensor, requires) for tensor, (_, requires) in zip(self.tensors, self._requires, strict=True)
        ]
        return ""


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.shape, tensor.dtype, tensor.device


def drop_provenance() -> None:
    """Make plain tensors of the parameters that ``TraceGraph_ELBO`` has put into the store with their provenance."""
    store = pyro.get_param_store()
    for name, value in [*store._params.items()]:
        if isinstance(value, ProvenanceTensor):
            store._param_to_name.pop(value, None)
            plain = store._params[name] = detach_provenance(value)
            store._param_to_name[plain] = name


def held(modules: Sequence[nn.Module]) -> dict[int, Tensor]:
    """The tensors of the param store and of modules, by id."""
    found = {id(value): value for value in pyro.get_param_store()._params.values()}
    for module in modules:
        for mapping in (module._parameters, module._buffers):
            found.update({id(value): value for value in mapping.values() if value is not None})
    return found


@contextmanager
def unchanged(modules: Sequence[nn.Module], tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Put back, after the block, what a run has written into parameters, buffers and ``tensors``, or replaced."""
    store = pyro.get_param_store()
    mappings: list[Any] = [store._params]
    mappings += [mapping for module in modules for mapping in (module._parameters, module._buffers)]
    entries = [(mapping, dict(mapping)) for mapping in mappings]
    values = [(value, value._version, value.detach().clone()) for value in {**tensors, **held(modules)}.values()]
    try:
        yield
    finally:
        for mapping, kept in entries:
            for name, value in kept.items():
                if mapping.get(name) is not value:
                    store._param_to_name.pop(mapping.get(name), None)
                    mapping[name] = value
        with torch.no_grad():
            for value, version, copy in values:
                # a batch norm writes its statistics without counting it as a new version
                if value._version != version or not torch.equal(value, copy):
                    value.copy_(copy)
