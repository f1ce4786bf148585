"""Plates of an autoguide whose latent sites may lie along rows of which a call sees some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide

from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.rows import plates_of_call, subsamples


def plates_for_call(guide: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The plates of the latent sites, with the rows that the model sees in this call; also set as ``guide.plates``."""
    if guide.master is not None or guide.create_plates is not None:
        return dict(AutoGuide._create_plates(guide, *args, **kwargs))
    model = None if guide._model is None else guide.model
    guide.plates = {plate.name: plate for plate in plates_of_call(model, guide._prototype_frames, *args, **kwargs)}
    for name, frame in sorted(guide._prototype_frames.items()):
        if name not in guide.plates:
            guide.plates[name] = pyro.plate(name, frame.full_size or frame.size, dim=frame.dim)
    plates: dict[str, Any] = guide.plates
    return plates


def check_rows_of_model(guide: Any, frames: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
    """Refuse a model whose rows cannot be known beforehand, so that the guide would see others.

    Args:
        guide: An autoguide.
        frames: Plates of which its model sees some rows.
        *args: Arguments of the model.
        **kwargs: Its keyword arguments.

    Raises:
        ModelError: The model draws the rows itself, or the guide is part of a list that draws others.
    """
    one, two = (subsamples(guide.model, frames, *args, **kwargs) for _ in range(2))
    for name, (_, index) in one.items():
        other = two[name][1]
        if index is None or other is None:
            continue
        if not torch.equal(torch.as_tensor(index), torch.as_tensor(other)):
            raise ModelError(
                f"the model draws the rows of plate {name!r} itself (subsample=), so that a guide cannot know "
                "which these are: draw them outside and pass them as an argument, or let the plate draw them "
                "(subsample_size=)"
            )
        if guide.master is not None and guide.master().create_plates is None:
            raise ModelError(
                f"the model says which rows of plate {name!r} it sees (subsample=), but "
                f"{type(guide.master()).__name__} draws others; give it create_plates=, with this plate"
            )
