"""The old file or the new one, never half, and nothing left behind."""

import errno
import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ranvier.atomic import differences, replacing, write_json


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("existing", [None, "old"])
def test_writes_and_replaces(tmp_path: Path, existing: str | None) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    if existing:
        path.parent.mkdir(parents=True)
        path.write_text(existing)
    with replacing(path) as temporary:
        assert temporary.parent == path.parent  # the same file system, so that the rename is atomic
        temporary.write_text("new")
        assert not path.exists() if existing is None else path.read_text() == existing
    assert path.read_text() == "new"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), ValueError("no")])
def test_a_failing_block_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with replacing(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"could not write .*a\.txt .*No space left.*untouched") as caught:
        write()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_really_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, "old")
    with file_size_limit(4096), pytest.raises(OSError, match=r"could not write .*a\.json"):
        write_json(path, "x" * 100_000)
    assert json.loads(path.read_text()) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), replacing(tmp_path / "file" / "a.txt"):
        pass


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="It is a folder: name a file in it"), replacing(tmp_path / "a") as file:
        file.write_text("")


def test_others_may_read_the_file_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
        assert os.umask(0o027) == 0o027  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_json_is_indented_and_ends_in_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, 2.5], "b": None})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [1, 2.5], "b": None}
    assert text.startswith('{\n  "a"')
    assert text.endswith("}\n")


def test_json_that_cannot_be_said_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert path.read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_differences_are_named_by_their_place() -> None:
    before = {"recipe": {"epochs": 3, "betas": [0.9, 0.99]}, "old": 1}
    assert differences(before, {"recipe": {"epochs": 3, "betas": (0.9, 0.99)}, "old": 1}) == []
    assert differences(before, {"recipe": {"epochs": 5, "betas": (0.9, 0.99)}, "new": 2}) == [
        "new: None -> 2",
        "old: 1 -> None",
        "recipe.epochs: 3 -> 5",
    ]
