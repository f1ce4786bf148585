"""A parameter of a guide: its unconstrained leaf tensor, read and written as its constrained value."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import ExpTransform, constraints, transform_to


class Leaf:
    """An unconstrained parameter, read and written as its constrained value.

    Args:
        module: The module that holds it.
        name: Its name there.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        values = dict(module.named_parameters(recurse=False))
        self.tensor = values[f"{name}_unconstrained"] if f"{name}_unconstrained" in values else values[name]
        registered = getattr(module, "_pyro_params", {})
        self.transform = transform_to(registered[name][0] if name in registered else constraints.real)
        self.is_tril = self.transform.codomain is constraints.lower_cholesky

    def value(self) -> Tensor:
        """The constrained value."""
        return self.transform(self.tensor)

    def grad(self) -> Tensor:
        """Gradient of minus the loss with respect to the constrained value."""
        assert self.tensor.grad is not None
        grad = -self.tensor.grad
        if self.is_tril:  # strictly lower entries as they are, the diagonal by exp
            diagonal = grad.diagonal(dim1=-2, dim2=-1) / self.value().diagonal(dim1=-2, dim2=-1)
            return grad.tril(-1) + torch.diag_embed(diagonal)
        return grad / self.derivative()

    def derivative(self) -> Tensor:
        """Derivative of an elementwise transform."""
        return self.transform.log_abs_det_jacobian(self.tensor, self.value()).exp()

    def log_grad(self, value: Tensor) -> Tensor:
        """Gradient of minus the loss with respect to the logarithm of the present ``value``, in a tensor of its own."""
        assert self.tensor.grad is not None
        if isinstance(self.transform, ExpTransform):
            return -self.tensor.grad
        return -self.tensor.grad * (value / self.transform.log_abs_det_jacobian(self.tensor, value).exp())

    def write(self, value: Tensor) -> None:
        """Set the constrained value."""
        self.tensor.data.copy_(self.transform.inv(value))


class UnitTrilLeaf(Leaf):
    """A unit lower triangular matrix, of whose leaf only the part below the diagonal matters."""

    def grad(self) -> Tensor:
        """Gradient of minus the loss."""
        assert self.tensor.grad is not None
        return -self.tensor.grad

    def write(self, value: Tensor) -> None:
        """Set the matrix."""
        self.tensor.data.copy_(value)
