"""Guides and models that other packages offer, found by their entry points when a name is not one of ours.

A package offers them in its ``pyproject.toml``:

.. code-block:: toml

    [project.entry-points."pyro_vi_lab.guides"]
    their_guide = "their_package.guides:TheirGuide"

    [project.entry-points."pyro_vi_lab.models"]
    their_model = "their_package.problems:example"

Nothing is read at import, and nothing for a name of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from pyro_vi_lab.errors import PluginError, unknown_name

Kind = Literal["guide", "model"]
GROUPS: dict[Kind, str] = {"guide": "pyro_vi_lab.guides", "model": "pyro_vi_lab.models"}
"""The group of entry points for each kind of thing that a package can offer."""


@functools.cache
def entries(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, in the order of their names; the installed packages are read once."""
    return tuple(sorted(entry_points(group=group), key=lambda entry: entry.name))


def offered(kind: Kind, built_in: Collection[str]) -> tuple[str, ...]:
    """The names that installed packages offer.

    Args:
        kind: What is asked for.
        built_in: The names of ours, which no package may take.

    Raises:
        PluginError: A package offers something under a name of ours, or two offer the same name.
    """
    owners: dict[str, str] = {}
    for entry in entries(GROUPS[kind]):
        if entry.name in built_in:
            raise PluginError(
                f"package {_owner(entry)} offers a {kind} {entry.name!r}, but that is the name of a {kind} of "
                "pyro_vi_lab: it has to be renamed there; until then, uninstall the package"
            )
        if entry.name in owners:
            raise PluginError(
                f"packages {owners[entry.name]} and {_owner(entry)} both offer a {kind} {entry.name!r}: uninstall one"
            )
        owners[entry.name] = _owner(entry)
    return tuple(owners)


def load(kind: Kind, name: str, built_in: Collection[str]) -> Any:
    """What the package that offers ``name`` has there.

    Args:
        kind: What is asked for.
        name: Its name.
        built_in: The names of ours, which no package may take.

    Raises:
        ArgumentError: No package offers it; the message suggests the nearest name.
        PluginError: It cannot be imported, or the names clash; the message names the package.
    """
    names = offered(kind, built_in)
    if name not in names:
        raise unknown_name(kind, name, [*built_in, *names])
    (entry,) = (one for one in entries(GROUPS[kind]) if one.name == name)
    try:
        return entry.load()
    except Exception as error:  # code of others: whatever it raises, the user has to know whose it is
        raise PluginError(
            f"the {kind} {name!r} of package {_owner(entry)} cannot be imported from {entry.value}: "
            f"{type(error).__name__}: {error}"
        ) from error


def refused(kind: Kind, name: str, why: str) -> PluginError:
    """Error for something that was imported and cannot be used.

    Args:
        kind: What was asked for.
        name: Its name.
        why: What it is, and what it should be.
    """
    owner = next((_owner(entry) for entry in entries(GROUPS[kind]) if entry.name == name), "unknown")
    return PluginError(f"the {kind} {name!r} of package {owner} cannot be used: {why}")


def _owner(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else f"of module {entry.module}"
