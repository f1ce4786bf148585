"""What can go wrong, in the user's words.

Every deliberate error derives from :class:`LabError` and from the built-in that fits, so that ``except ValueError``
keeps working and ``except vl.LabError`` catches all of ours and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LabError(Exception):
    """Base of every error that pyro_vi_lab raises on purpose."""


class ModelError(LabError, ValueError):
    """The Pyro model cannot be used as it is: a site, a plate or its structure."""


class DataError(LabError, ValueError):
    """The data do not fit: a missing value, a length, a type."""


class ArgumentError(LabError, ValueError):
    """An argument has a value that makes no sense."""


class CaptureError(LabError, RuntimeError):
    """A computation could not be turned into a graph; the eager tier is used instead."""


class CompileError(LabError, RuntimeError):
    """A graph cannot be compiled; another tier is used instead, unless it was asked for."""


class FitError(LabError, RuntimeError):
    """The result of a fit that failed was asked for."""


class FileError(LabError, OSError):
    """A file cannot be read or written."""


class ExtraError(LabError, ImportError):
    """A package is missing that comes with one of the extras of pyro_vi_lab."""


class PluginError(LabError, ImportError):
    """A guide or a model that another package offers cannot be used; the message names the package."""


class LabWarning(UserWarning):
    """A fallback that changes speed or precision, said once."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ArgumentError:
    """Error for a name that is not in a table, with the nearest one that is.

    Example:
        >>> print(unknown_name("guide", "fullrank", ["mean_field", "full_rank"]))
        unknown guide 'fullrank': did you mean 'full_rank'? Known: full_rank, mean_field
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ArgumentError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(names)}")
