"""Files that are written whole or not at all: under another name first, and moved to their place when they are done."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyro_vi_lab.errors import FileError


def check_writable(directory: Path) -> None:
    """See whether files can be put into ``directory``, and leave nothing behind.

    Raises:
        FileError: It is a file, or it cannot be written to or created.
    """
    _staging(directory).rmdir()


def check_room(directory: Path, num_bytes: int) -> None:
    """See whether a disk has room for ``num_bytes`` more.

    Raises:
        FileError: It has not.
    """
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise FileError(
            f"cannot write to {directory.parent}: {num_bytes / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are "
            "free; choose another disk, or make room"
        )


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """An empty folder whose files move into ``directory`` when the block ends, unless it ends with an error.

    Raises:
        FileError: ``directory`` cannot be written to, or the disk is full.
    """
    folder = _staging(directory)
    try:
        yield folder
        directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir()):
            _move(path, directory / path.name)
    except FileError:
        raise
    except OSError as error:
        raise _unwritable(directory, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what will be ``path``, a file or a folder, when the block ends without an error.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole(Path(folder) / "x.txt") as place:
        ...         _ = place.write_text("done")
        ...         early = (Path(folder) / "x.txt").exists()
        ...     early, (Path(folder) / "x.txt").read_text()
        (False, 'done')

    Raises:
        FileError: ``path`` cannot be written to, or the disk is full.
    """
    with staged(path.parent) as folder:
        yield folder / path.name


def _move(path: Path, target: Path) -> None:
    """Move a file or a folder, which takes the place of one that is there; the old one stays until then."""
    if target.is_dir() and not target.is_symlink() and path.is_dir():
        # a folder cannot be renamed over another that is not empty
        old = Path(tempfile.mkdtemp(prefix=".pyro-vi-lab-", dir=target.parent))
        try:
            os.replace(target, old / target.name)
            os.replace(path, target)
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(path, target)


def _staging(directory: Path) -> Path:
    """A new empty folder on the file system of ``directory``: inside it, or inside its nearest parent that exists."""
    try:
        place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        if not place.is_dir():
            raise NotADirectoryError(f"{place} is a file")
        return Path(tempfile.mkdtemp(prefix=".pyro-vi-lab-", dir=place))
    except OSError as error:
        raise _unwritable(directory, error) from error


def _unwritable(directory: Path, error: OSError) -> FileError:
    return FileError(f"cannot write to {directory}: {error.strerror or error}; choose another directory")
