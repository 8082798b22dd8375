"""Files that are either whole or not there: written beside, flushed and renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mohawk_nas.errors import MohawkError, TrainingError

__all__ = [
    "DamagedFile",
    "RowFile",
    "atomic_folder",
    "atomic_write",
    "flush",
    "load_metadata",
    "load_tensors",
    "read_json",
    "save_tensors",
    "telling_write_errors",
    "write_json",
]

ABANDONED = 24 * 3600.0
"""Seconds after which a temporary file that nobody has written to is a killed process's."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EFBIG, errno.EIO, errno.EROFS)


class DamagedFile(MohawkError):
    """A file is there but does not hold what it should; callers make it again, or say how."""


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place once the block has ended well.

    The block must create the file. Folders above it are made. After an error the temporary file is
    gone and ``path`` is as it was; several processes may write the same file, and the last one
    wins.

    Raises:
        TrainingError: The disk, or the user's share of it, is full.
    """
    path = Path(path)
    beside = _beside(path)
    try:
        with telling_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            # Not every file system reports a full disk before the data are flushed.
            flush(beside)
            os.replace(beside, path)
            # The new name survives a power cut; some network disks cannot flush a folder.
            with contextlib.suppress(OSError):
                flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, which takes its place once the block has ended well.

    What stood at ``path`` is then gone. After an error the temporary folder is gone and ``path`` is
    as it was; a process that is killed while they change places leaves the old one beside it.

    Raises:
        TrainingError: The disk, or the user's share of it, is full.
    """
    path = Path(path)
    beside, old = _beside(path), _beside(path)
    try:
        with telling_write_errors(path):
            beside.mkdir(parents=True)
            yield beside
            for file in beside.rglob("*"):
                flush(file)
            if path.exists():
                path.rename(old)
            try:
                beside.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
    finally:
        for left in (beside, old):
            shutil.rmtree(left, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A new temporary path; removes what processes that were killed left of others."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            # Others may be writing theirs at this moment.
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


@contextlib.contextmanager
def telling_write_errors(path: Path) -> Iterator[None]:
    """Tell in one line that a path cannot be written, most often because the disk is full.

    Raises:
        TrainingError: So it is.
    """
    try:
        yield
    except (OSError, SafetensorError) as e:
        number = e.errno if isinstance(e, OSError) else _system_error(e)
        if number in _NOT_WRITABLE:
            raise TrainingError(f"{path}: cannot be written: {os.strerror(number)}") from e
        if number not in _DISK_FULL:
            raise
        raise TrainingError(
            f"{path}: no space left to write it ({_free(path.parent)} free); "
            "make room, or name a folder on another disk"
        ) from e


def _system_error(error: SafetensorError) -> int | None:
    # The library gives the number of a system error in its text only.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON.

    Raises:
        TrainingError: The disk is full.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    with atomic_write(path) as beside:
        beside.write_text(f"{text}\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """What :func:`write_json` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFile: It is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise DamagedFile(f"{path}: must hold JSON, but does not: {e}") from e


class RowFile:
    """JSON objects, one a line, appended one by one; a file that a killed process left is mended.

    Args:
        path: Made when the first row is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if not path.is_file():
            return
        with path.open("rb") as file:
            # Nobody is in the middle of a line while this is held.
            fcntl.flock(file, fcntl.LOCK_SH)
            lines = file.readlines()
        # The last line was being written when its process was stopped; the next row cuts it off.
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            self.rows = [json.loads(line) for line in whole]
        except ValueError as e:
            raise DamagedFile(
                f"{path}: must hold one JSON object a line, but does not ({e})"
            ) from e

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; several processes may do so at once."""
        with telling_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                _cut_unfinished_line(file)
                file.write(f"{json.dumps(row)}\n".encode())
        self.rows.append(dict(row))

    def find(self, **wanted: Any) -> Iterator[dict[str, Any]]:
        """Rows with these values."""
        for row in self.rows:
            if all(row.get(key) == value for key, value in wanted.items()):
                yield row


def _cut_unfinished_line(file: BinaryIO) -> None:
    if size := file.seek(0, os.SEEK_END):
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors; they may stand on any device but must not share memory.

    Raises:
        TrainingError: The disk is full.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as beside:
        # Newer releases of safetensors rename a private temporary file onto this one, so it would
        # be readable by its owner alone; the mode of an ordinary new file is kept for it.
        beside.touch()
        mode = beside.stat().st_mode
        save_file(plain, beside, metadata=dict(metadata) if metadata else None)
        beside.chmod(mode)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    They are mapped from the file and read when used; changing one does not change the file.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFile: It is cut short, or not safetensors.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as e:
        raise DamagedFile(f"{path}: must hold safetensors, but is damaged: {e}") from e
    return tensors


def load_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that :func:`save_tensors` wrote with the tensors.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFile: It is cut short, or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as e:
        raise DamagedFile(f"{path}: must hold safetensors, but is damaged: {e}") from e


def flush(path: Path) -> None:
    """Have the system write a file or folder to its disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"
