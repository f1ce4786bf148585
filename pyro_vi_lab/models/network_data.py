"""Rows for a network with random weights: inputs, outcomes, and whether they and the network fit together."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.models.row_values import as_rows

NetworkLikelihood = Literal["normal", "categorical", "bernoulli"]
LIKELIHOODS: tuple[NetworkLikelihood, ...] = ("normal", "categorical", "bernoulli")
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
"""Layers that take whole numbers as they are."""


def network_inputs(X: Any, net: nn.Module, dtype: torch.dtype) -> Tensor:
    """Rows of inputs in the type of the network; whole numbers stay such where it looks them up.

    Raises:
        DataError: No rows, or values that are no numbers, missing or infinite; the message names the row.

    Example:
        >>> network_inputs([[1, 2]], nn.Linear(2, 1), torch.float32)
        tensor([[1., 2.]])
    """
    inputs, _ = as_rows(X)
    if inputs.is_floating_point() or not any(isinstance(layer, EMBEDDINGS) for layer in net.modules()):
        inputs = inputs.to(dtype)
    if inputs.dim() == 0 or inputs.numel() == 0:
        raise DataError(f"X has shape {tuple(inputs.shape)}: expected at least one row, (rows, ...)")
    _refuse_missing("X", inputs)
    return inputs


def network_outcome(y: Any, num_rows: int, likelihood: NetworkLikelihood, dtype: torch.dtype) -> Tensor:
    """The outcome of every row: numbers in the type of the network, or labels.

    Raises:
        DataError: Not one outcome for each row, a value that is missing or infinite, or no label; the message names the
            row.

    Example:
        >>> network_outcome([0, 2.5], 2, "categorical", torch.float32)
        Traceback (most recent call last):
            ...
        pyro_vi_lab.errors.DataError: y has the label 2.5 in row 1; expected classes 0, 1, 2, ...
    """
    outcome, _ = as_rows(y, "y")
    if outcome.dim() == 2 and outcome.shape[1] == 1:
        raise DataError(f"y has shape {tuple(outcome.shape)}; expected ({num_rows},), one value per row: y[:, 0]")
    if outcome.dim() == 0 or len(outcome) != num_rows:
        raise DataError(f"X has {num_rows} rows and y has shape {tuple(outcome.shape)}; each row needs its outcome")
    _refuse_missing("y", outcome)
    if likelihood == "normal":
        return outcome.to(dtype)
    if outcome.dim() != 1:
        raise DataError(f"y has shape {tuple(outcome.shape)}; expected ({num_rows},), one label per row")
    whole = outcome == outcome.double().round()
    if likelihood == "bernoulli":
        whole &= (outcome == 0) | (outcome == 1)
    if not bool(whole.all()):
        row = int((~whole).nonzero()[0])
        kinds = "0 and 1" if likelihood == "bernoulli" else "classes 0, 1, 2, ..."
        raise DataError(f"y has the label {float(outcome[row]):g} in row {row}; expected {kinds}")
    return outcome.to(dtype) if likelihood == "bernoulli" else outcome.long()


def one_output(outputs: Any, likelihood: NetworkLikelihood) -> Tensor:
    """What a network gives, a single output of each row without its axis.

    Shape:
        ``(N, 1)`` to ``(N,)``, but logits of classes; all else as it is.
    """
    if not isinstance(outputs, Tensor):
        raise ArgumentError(f"net must give one tensor, it gives a {type(outputs).__name__}")
    one = outputs.dim() == 2 and outputs.shape[1] == 1 and likelihood != "categorical"
    return outputs.squeeze(-1) if one else outputs


def check_outputs(net: nn.Module, X: Tensor, y: Tensor | None, likelihood: NetworkLikelihood) -> None:
    """Run a network on the first rows, and see whether likelihood and outcome fit what comes out.

    Raises:
        DataError: The network cannot take such rows, or a label is out of the range of its outputs.
        ArgumentError: Its outputs do not fit the likelihood, are not finite, or depend on the other rows.
    """
    few = X[:2]
    try:
        with torch.no_grad():
            outputs, alone = net(few), net(few[:1])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"net cannot take X of shape {tuple(X.shape)}, of which a row has {tuple(X.shape[1:])}: {reason}"
        ) from error
    outputs, alone = one_output(outputs, likelihood), one_output(alone, likelihood)
    _check_shape(outputs, len(few), y, likelihood)
    bad = ~torch.isfinite(outputs)
    if bool(bad.any()):
        raise ArgumentError(f"net gives outputs that are not finite, in row {int(bad.nonzero()[0][0])} of X")
    eps = torch.finfo(outputs.dtype).eps ** 0.5
    if not torch.allclose(outputs[:1], alone, rtol=eps, atol=eps * float(1 + alone.abs().max())):
        raise ArgumentError(
            "net gives another output for the first row of X alone than beside the second: the likelihood is no "
            "product over rows, and that of a minibatch no estimate of it"
        )


def _check_shape(outputs: Tensor, num_rows: int, y: Tensor | None, likelihood: NetworkLikelihood) -> None:
    shape = tuple(outputs.shape)
    given = f"net gives {shape} for {num_rows} rows"
    if outputs.dim() == 0 or len(outputs) != num_rows:
        raise ArgumentError(f"{given}; expected one output or a row of outputs each")
    if likelihood == "categorical":
        if outputs.dim() != 2 or shape[1] < 2:
            raise ArgumentError(
                f"{given}; likelihood='categorical' needs a logit for each of at least two classes, (rows, classes)"
            )
        if y is not None and bool((wrong := (y < 0) | (y >= shape[1])).any()):
            row = int(wrong.nonzero()[0])
            raise DataError(
                f"y has the label {int(y[row])} in row {row}; net has {shape[1]} outputs, for classes 0 to "
                f"{shape[1] - 1}"
            )
    elif likelihood == "bernoulli":
        if outputs.dim() != 1:
            raise ArgumentError(f"{given}; likelihood='bernoulli' needs one logit each, (rows, 1)")
    elif outputs.dim() > 2:
        raise ArgumentError(f"{given}; expected (rows,) or (rows, outputs)")
    elif y is not None and y.shape[1:] != outputs.shape[1:]:
        raise ArgumentError(
            f"{given}; y has shape {tuple(y.shape)}, so it needs {y.shape[1] if y.dim() == 2 else 1} output(s) for "
            "each row"
        )


def _refuse_missing(name: str, values: Tensor) -> None:
    if not values.is_floating_point():
        return
    bad = ~torch.isfinite(values.reshape(len(values), -1)).all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"{name} has missing or infinite values in {int(bad.sum())} row(s), the first of them row {row}; remove "
            "or impute such rows"
        )
