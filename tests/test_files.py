import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mohawk_nas import files
from mohawk_nas.errors import TrainingError
from mohawk_nas.files import (
    DamagedFile,
    RowFile,
    atomic_folder,
    atomic_write,
    load_metadata,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with atomic_write(path) as beside:
        beside.write_text("one")
        assert beside.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(KeyError), atomic_write(path) as beside:
        beside.write_text("two")
        raise KeyError
    assert path.read_text() == "one"
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_killed_processes_left_is_removed_a_day_later(tmp_path: Path) -> None:
    path = tmp_path / "file"
    old, new, others = (tmp_path / f".{n}.tmp" for n in ("file.1", "file.2", "file2.1"))
    folder = tmp_path / ".file.3.tmp"
    for left in (old, new, others):
        left.write_text("half")
    folder.mkdir()
    for left in (old, others, folder):
        os.utime(left, (0, 0))
    with atomic_write(path) as beside:
        beside.write_text("whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".file.2.tmp", ".file2.1.tmp", "file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(number: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    with (
        pytest.raises(TrainingError, match=r"file: no space left to write it \([\d,]+ MiB free\)"),
        atomic_write(path) as beside,
    ):
        beside.write_text("half")
        raise OSError(number, os.strerror(number))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "one"
    with (
        pytest.raises(TrainingError, match=r"file: cannot be written: File too large$"),
        atomic_write(path),
    ):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    with pytest.raises(PermissionError), atomic_write(path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_full_disk_as_safetensors_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise files.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(TrainingError, match="no space left to write it"):
        save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    with atomic_folder(path) as beside:
        (beside / "inner").mkdir()
        (beside / "inner" / "file").write_text("one")
        assert not path.exists()
    assert (path / "inner" / "file").read_text() == "one"
    with pytest.raises(KeyError), atomic_folder(path) as beside:
        (beside / "file").write_text("two")
        raise KeyError
    assert [p.name for p in path.parent.iterdir()] == ["folder"]
    assert [p.name for p in path.iterdir()] == ["inner"]
    with atomic_folder(path) as beside:
        (beside / "file").write_text("three")
    assert [p.name for p in path.parent.iterdir()] == ["folder"]
    assert [p.name for p in path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        files.SafetensorError("Error while serializing: I/O error: No space (os error 28)"),
    ],
)
def test_full_disk_while_a_folder_is_written(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "file").write_text("one")
    with (
        pytest.raises(
            TrainingError, match=r"folder: no space left to write it \([\d,]+ MiB free\)"
        ),
        atomic_folder(path) as beside,
    ):
        (beside / "file").write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert (path / "file").read_text() == "one"
    with pytest.raises(files.SafetensorError, match="header"), atomic_folder(path):
        raise files.SafetensorError("header too large")


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"b": [1, 2.5, None, True], "a": "ü"}
    write_json(path, value)
    assert read_json(path) == value
    assert list(read_json(path)) == ["b", "a"]
    path.write_text('{"a": 1')
    with pytest.raises(DamagedFile, match=r"x.json: must hold JSON, but does not: "):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DamagedFile, match=r"x.json: must hold JSON"):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_tensors(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    tensors["c"] = torch.nn.Parameter(torch.zeros(1))
    save_tensors(path, tensors, {"note": "x"})
    assert load_metadata(path) == {"note": "x"}
    loaded = load_tensors(path)
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    # Like any other new file, so that a shared folder can be read by those who share it.
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode

    loaded["a"].fill_(7)
    assert torch.equal(load_tensors(path)["a"], tensors["a"])
    for content in (b"", path.read_bytes()[:-1], b"rubbish" * 9):
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match=r"t.safetensors: must hold safetensors, but is dam"):
            load_tensors(path)
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "none.safetensors")


def test_a_row_is_never_written_behind_half_of_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    one, other = RowFile(path), RowFile(path)
    one.add({"a": 1})
    # Another process was stopped in the middle of a line, while this one goes on.
    with path.open("a", encoding="utf-8") as file:
        file.write('{"b": 2')
    assert RowFile(path).rows == [{"a": 1}]
    other.add({"c": 3})
    assert RowFile(path).rows == [{"a": 1}, {"c": 3}]
    path.chmod(0o400)
    assert RowFile(path).rows == [{"a": 1}, {"c": 3}]
