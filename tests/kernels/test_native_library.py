"""Sources are compiled once for their definitions, and again where what was kept is no library."""

import _ctypes
import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ranvier import provenance
from ranvier.kernels import native_library
from ranvier.kernels.native_library import HEADERS, by_column, definitions, load, threads_for

SOURCE = 'extern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source of its own, and a cache folder of its own."""
    if provenance.cpp_compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("RANVIER_CACHE", str(tmp_path / "cache"))
    load.cache_clear()
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    yield path
    load.cache_clear()


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "kernels").iterdir())


def test_definitions_make_libraries_of_their_own_which_are_kept(source: Path, tmp_path: Path) -> None:
    assert load(source, ("-DANSWER=3",)).answer() == 3
    assert load(source, ("-DANSWER=4",)).answer() == 4
    before = {path: path.stat().st_mtime_ns for path in kept(tmp_path)}
    assert len(before) == 2  # and nothing half made beside them
    load.cache_clear()
    assert load(source, ("-DANSWER=3",)).answer() == 3
    assert {path: path.stat().st_mtime_ns for path in kept(tmp_path)} == before


def test_a_changed_source_is_compiled_anew(source: Path, tmp_path: Path) -> None:
    assert load(source, ("-DANSWER=3",)).answer() == 3
    source.write_text(SOURCE.replace("ANSWER;", "10 * ANSWER;"))
    load.cache_clear()
    assert load(source, ("-DANSWER=3",)).answer() == 30
    assert len(kept(tmp_path)) == 2


def test_a_library_that_was_cut_off_is_made_again(source: Path, tmp_path: Path) -> None:
    _ctypes.dlclose(load(source, ("-DANSWER=5",))._handle)  # what is loaded would be found by its name
    load.cache_clear()
    (library,) = kept(tmp_path)
    library.write_bytes(library.read_bytes()[:100])
    assert load(source, ("-DANSWER=5",)).answer() == 5
    assert library.stat().st_size > 100
    assert isinstance(ctypes.CDLL(str(library)), ctypes.CDLL)


def test_what_does_not_compile_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"compiling them failed: .*error"):
        load(source, ())  # ANSWER is not defined
    assert kept(tmp_path) == []


def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RANVIER_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="cannot be written or read.*Set RANVIER_CACHE to another folder"):
        load(source, ("-DANSWER=3",))


def test_headers_are_there() -> None:
    assert all(header.exists() for header in HEADERS)


def test_long_runs_share_one_library() -> None:
    most = native_library.UNROLLED
    assert f"-DSTEPS={most}" in definitions(torch.float32, most, sends_bytes=True)
    assert definitions(torch.float32, most + 1, sends_bytes=True) == definitions(torch.float32, 500, sends_bytes=True)


def test_few_values_are_one_threads_work() -> None:
    assert threads_for(native_library.ALONE - 1) == 1
    assert threads_for(native_library.ALONE) == torch.get_num_threads()


def test_values_of_channels_go_on_past_the_end() -> None:
    """A line that begins at the last column still finds the values of the first."""
    values = torch.tensor([1.0, 2.0, 3.0])
    long = by_column(values, 6)
    assert len(long) == 6 + native_library.LINE
    assert long.tolist() == [float(1 + column % 6 // 2) for column in range(len(long))]
    assert torch.equal(by_column(torch.stack([values, 10 * values]), 6)[1], 10 * long)
