"""Names of variables and dimensions that every file format and tool takes: letters, digits and underscores."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

SAFE = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")
"""What the Climate and Forecast conventions of NetCDF allow (CF-1.11, Section 2.3)."""


def safe_names(names: Iterable[str], reserved: Collection[str] = ()) -> dict[str, str]:
    """A safe name for each name; different names stay different, and those that are safe stay as they are.

    Greek letters are spelled out, accents left out, other letters written by their number, and all else becomes an
    underscore.

    Args:
        names: Names of sites or dimensions.
        reserved: Names that have another meaning, and get an underscore.

    Example:
        >>> safe_names(["theta", "θ", "encoder.0/weight", "a b", "a-b", "chain"], reserved=("chain",))
        {'theta': 'theta', 'θ': 'theta_2', 'encoder.0/weight': 'encoder_0_weight', 'a b': 'a_b', 'a-b': 'a_b_2', \
'chain': 'chain_'}
    """
    every = list(dict.fromkeys(names))
    result = {name: name for name in every if SAFE.match(name) and name not in reserved}
    taken = set(result.values()).union(reserved)
    for name in every:
        if name not in result:
            base = f"{name}_" if name in reserved else _spelled(name)
            new, count = base, 1
            while new in taken:
                count += 1
                new = f"{base}_{count}"
            result[name] = new
            taken.add(new)
    return {name: result[name] for name in every}


def _spelled(name: str) -> str:
    text = re.sub("_+", "_", "".join(map(_letter, name))).strip("_")
    if not text:
        return "unnamed"
    return text if text[0].isalpha() else f"x_{text}"


def _letter(character: str) -> str:
    if character.isascii():
        return character if character.isalnum() else "_"
    described = unicodedata.name(character, "").split(" WITH ")[0].split()
    if described[:1] == ["GREEK"] and described[2:3] == ["LETTER"]:
        return described[-1].lower() if described[1] == "SMALL" else described[-1].capitalize()
    plain = "".join(part for part in unicodedata.normalize("NFKD", character) if part.isascii() and part.isalnum())
    return plain or (f"u{ord(character):04x}" if character.isalnum() else "_")
