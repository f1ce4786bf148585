"""Standardized covariates and outcomes, and the way back to the scale of the data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scaling:
    r"""Means and standard deviations (divisor N) of covariates, and of an outcome that is measured on a scale.

    With :math:`\tilde x = (x - m) / s` and :math:`\tilde y = (y - m_y) / s_y`,

    .. math::
        \tilde y = \tilde\alpha + \tilde\beta \cdot \tilde x \iff y = \alpha + \beta \cdot x, \quad
        \beta_i = s_y \tilde\beta_i / s_i, \quad \alpha = m_y + s_y \tilde\alpha - \beta \cdot m

    Args:
        center: m.
        scale: s.
        y_center: m_y; 0 of outcomes that are counts or classes.
        y_scale: s_y; 1 of those.

    Shape:
        center and scale ``(D,)``, the others ``()``.

    Example:
        >>> import torch
        >>> scaling = Scaling.of(torch.tensor([[1.0], [3.0]]), torch.tensor([10.0, 14.0]))
        >>> intercept, beta = scaling.original(torch.tensor(0.0), torch.tensor([1.0]))
        >>> intercept.item(), beta.item()  # the line through both points
        (8.0, 2.0)
    """

    center: Tensor
    scale: Tensor
    y_center: Tensor
    y_scale: Tensor

    @classmethod
    def of(cls, X: Tensor, y: Tensor | None) -> Scaling:
        """The scaling that makes these data standardized; without an outcome that of the covariates alone."""
        zero = X.new_zeros(())
        y_center, y_scale = (zero, zero + 1) if y is None else (y.mean(), y.std(correction=0))
        center = X.mean(0)
        # not std(0), which warns of tables without columns
        return cls(center, (X - center).square().mean(0).sqrt(), y_center, y_scale)

    def covariates(self, X: Tensor) -> Tensor:
        """The covariates, standardized."""
        return (X - self.center) / self.scale

    def outcome(self, y: Tensor) -> Tensor:
        """The outcome, standardized."""
        return (y - self.y_center) / self.y_scale

    def original(self, intercept: Tensor, beta: Tensor, *, classes: bool = False) -> tuple[Tensor, Tensor]:
        """Intercept and coefficients of the data as they are, from those of the standardized data.

        Args:
            intercept: On the standardized scale.
            beta: The same.
            classes: Whether there is one of each for every class.

        Shape:
            intercept ``()`` and beta ``(D,)``, or ``(K,)`` and ``(D, K)``; or with the dimensions of vectorized
            particles or of draws to their left, intercept then ``(*, 1)`` or ``(*, 1, K)``.
        """
        axis = -2 if classes else -1
        scale, center = (value.unsqueeze(-1) if classes else value for value in (self.scale, self.center))
        slopes = self.y_scale * beta / scale
        shift = (slopes * center).sum(axis, keepdim=beta.dim() > -axis)
        return self.y_center + self.y_scale * intercept - shift, slopes
