"""What a user's model raises, with its line and its data."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import Tensor

from pyro_vi_lab.errors import LabError, LabWarning, ModelError


class user_errors:
    """Turns what a user's model raises into a :class:`ModelError` that names the model, its line and its data."""

    def __init__(self, name: str, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs or {}

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, (LabError, LabWarning)):
            return
        place = user_line(error)
        where = f" at {place}" if place else ""
        text = str(error).strip().splitlines()
        shapes = [
            f"{key} "
            f"{tuple(value.shape)}{' with NaN' if value.is_floating_point() and bool(value.isnan().any()) else ''}"
            for key, value in (*((f"argument {i}", v) for i, v in enumerate(self.args)), *self.kwargs.items())
            if isinstance(value, Tensor)
        ]
        data = f"; data: {', '.join(shapes)}" if shapes else ""
        raise ModelError(
            f"model {self.name} cannot be run{where}: {type(error).__name__}: {' '.join(text[:3])}{data}"
        ) from error


def is_indefinite(error: BaseException | None) -> bool:
    """Whether a model failed at a point because a matrix has no Cholesky factor or no inverse there."""
    name, text = type(error).__name__, str(error)
    return name == "_LinAlgError" or "linalg" in text or "PositiveDefinite" in text


def user_line(error: BaseException) -> str:
    """``file:line`` of the innermost frame that belongs to the user and not to torch, Pyro or this package."""
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        if _is_users_frame(frame):
            return f"{frame.f_code.co_filename}:{line}"
    return ""


def frame_line(frame: FrameType | None) -> str:
    """``file:line`` of the innermost of ``frame`` and its callers that belongs to the user."""
    while frame is not None:
        if _is_users_frame(frame):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _is_users_frame(frame: FrameType) -> bool:
    # libraries make functions from strings, too; the user's are those of `python -c`
    made = frame.f_code.co_filename == "<string>" and frame.f_globals.get("__name__") != "__main__"
    return is_users(frame.f_code.co_filename) and not made


def is_users(filename: str) -> bool:
    """Whether a source file belongs neither to a library nor to this package."""
    here = os.path.dirname(__file__)
    library = f"{os.sep}site-packages{os.sep}" in filename or f"{os.sep}lib{os.sep}python" in filename
    ours = filename.startswith(here) and not filename.startswith(os.path.join(here, "models"))
    return not library and not ours and not filename.startswith("<frozen")
