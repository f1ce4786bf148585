"""The JSON file of a study: one row per part and key, written as soon as it is measured, and never measured twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks import machine

Row = dict[str, Any]


class Store:
    """The rows of every part by their keys.

    Args:
        directory: Where the files are.
        name: What they are called.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / f"{name}.json"
        self.page = directory / f"{name}.md"
        self._lock = Lock()
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.rows: dict[str, dict[str, Row]] = kept.get("rows", {})

    def get(self, part: str, key: str) -> Row | None:
        """A row, if it is there."""
        return self.rows.get(part, {}).get(key)

    def has(self, part: str, key: str, *, quick: bool) -> bool:
        """Whether a row need not be measured: not if that failed, a guide was absent, or it was a smoke run and this is none."""
        row = self.get(part, key)
        return row is not None and not {"failed", "absent"} & row.keys() and (quick or not row.get("quick", False))

    def put(self, part: str, key: str, row: Row) -> None:
        """Keep a row and write the file, whole or not at all."""
        with self._lock:
            self.rows.setdefault(part, {})[key] = row
            head = {"versions": machine.versions(), **machine.processor()}
            lines = [f' "{name}": {json.dumps(value)},' for name, value in head.items()]
            parts = [
                f"  {json.dumps(part)}: {{\n"
                + ",\n".join(f"   {json.dumps(key)}: {json.dumps(one)}" for key, one in sorted(rows.items()))
                + "\n  }"
                for part, rows in sorted(self.rows.items())
            ]
            text = "\n".join(["{", *lines, ' "rows": {', ",\n".join(parts), " }", "}"]) + "\n"
            fresh = self.path.with_suffix(".part")
            fresh.write_text(text)
            os.replace(fresh, self.path)
