"""Numbers and plain values in one file, without code: a zip of NumPy's arrays and a JSON header."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vi_lab.errors import FileError
from pyro_vi_lab.whole_files import whole

HEADER = "header.json"
FORMAT = "pyro-vi-lab 1"


def write_archive(path: Path, header: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> None:
    """Write a file, whole or not at all.

    Args:
        path: Where to.
        header: What JSON holds.
        arrays: Name to values.

    Raises:
        FileError: It cannot be written there.
    """
    entries = {name: {"file": f"{i}.npy", "type": str(value.dtype)} for i, (name, value) in enumerate(arrays.items())}
    text = json.dumps({"format": FORMAT, **header, "arrays": entries}, ensure_ascii=False)
    with whole(path) as place, zipfile.ZipFile(place, "w") as archive:
        archive.writestr(HEADER, text)
        for name, value in arrays.items():
            if value.dtype == torch.bfloat16:
                value = value.view(torch.int16)  # NumPy has no such type
            with archive.open(str(entries[name]["file"]), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value.numpy(force=True), allow_pickle=False)


def read_archive(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_archive` wrote: the header and the arrays. Nothing in the file is run.

    Raises:
        FileError: There is no such file, or it is something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            header = json.loads(archive.read(HEADER))
            if header["format"] != FORMAT:
                raise ValueError(f"it has the format {header['format']!r}, not {FORMAT!r}")
            arrays = {}
            for name, entry in header.pop("arrays").items():
                with archive.open(entry["file"]) as file:
                    value = torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False))
                arrays[name] = value.view(torch.bfloat16) if entry["type"] == "torch.bfloat16" else value
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise FileError(f"cannot read {path} as a file of pyro_vi_lab: {error}") from error
    return header, arrays


def part(arrays: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays whose names begin with ``prefix/``, without that."""
    return {name[len(prefix) + 1 :]: value for name, value in arrays.items() if name.startswith(f"{prefix}/")}
