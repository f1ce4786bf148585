"""The parts of the natural-gradient study that run pyro_vi_lab, each answered with one row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch

from benchmarks.channel import Channel
from benchmarks.natural_gradient import adam, gaussians, large, ours, special


def _answer(measure: Callable[..., dict[str, Any]], channel: Channel, **task: Any) -> None:
    torch.set_num_threads(1)
    pyro.clear_param_store()
    channel.send(measure(**task))


COMMANDS: dict[str, Callable[..., None]] = {
    name: partial(_answer, measure)
    for name, measure in {
        "ours": ours.posterior,
        "seeds": ours.seeds,
        "adam": adam.posterior,
        "special": special.case,
        "gaussian": gaussians.fit,
        "large_fit": large.fit,
        "large_gradient": large.gradient,
    }.items()
}
