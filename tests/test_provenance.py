"""Where a number comes from."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ranvier import provenance


def test_versions() -> None:
    found = provenance.versions()
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(found) == {"python", *provenance.PACKAGES}
    assert all(found.values())


def test_versions_of_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert provenance.versions()["no-such-package"] == "not installed"


def test_device_name_of_a_cpu_names_processor_and_threads() -> None:
    name = provenance.device_name("cpu")
    assert name.endswith(f", {torch.get_num_threads()} threads")
    assert len(name.removesuffix(f", {torch.get_num_threads()} threads")) > 2
    assert provenance.device_name() == provenance.device_name(torch.device("cpu"))


def test_processor_name_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", no_file)
    assert provenance._processor_name()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit that holds the module, as `provenance` sees it."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    module = tmp_path / "provenance.py"
    module.write_text("pass\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "provenance.py"], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(module))
    return tmp_path


def test_commit_of_a_clean_checkout(checkout: Path) -> None:
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert provenance.commit() == head.stdout[:12]


def test_commit_tells_of_changes(checkout: Path) -> None:
    clean = provenance.commit()
    (checkout / "data.txt").write_text("a file that git does not know changes no code")
    assert provenance.commit() == clean
    (checkout / "provenance.py").write_text("changed\n")
    assert provenance.commit() == f"{clean}+changes"


def test_no_commit_of_somebody_elses_repository(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel installed in an environment inside a user's repository must not report that repository's commit."""
    installed = checkout / "venv" / "ranvier" / "provenance.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("pass\n")
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert provenance.commit() is None


def test_no_commit_without_git_or_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "provenance.py"
    module.write_text("pass\n")
    monkeypatch.setattr(provenance, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None


def executable(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="the default differs by platform")
def test_cpp_compiler_is_the_one_that_torch_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile tries $CXX, or g++ on Linux, and nothing else: to name a clang++ that it will not try misleads."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    clang = executable(tmp_path / "clang++")
    assert provenance.cpp_compiler() is None
    gcc = executable(tmp_path / "g++")
    assert provenance.cpp_compiler() == str(gcc)
    monkeypatch.setenv("CXX", "clang++")
    assert provenance.cpp_compiler() == str(clang)
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert provenance.cpp_compiler() is None


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANVIER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert provenance.cache_folder() == tmp_path / ".cache" / "ranvier"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert provenance.cache_folder() == tmp_path / "xdg" / "ranvier"
    monkeypatch.setenv("RANVIER_CACHE", str(tmp_path / "own"))
    assert provenance.cache_folder() == tmp_path / "own"


def test_process_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert provenance.process_rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert provenance.process_rank() == 3


def test_no_other_module_reads_the_environment() -> None:
    """Results must not depend on variables that nothing records; `provenance` is the one place to look."""
    folder = Path(provenance.__file__).parent
    readers = [path.name for path in folder.rglob("*.py") if re.search(r"\benviron\b|\bgetenv\b", path.read_text())]
    assert readers == ["provenance.py"]


@pytest.mark.parametrize(
    ("idle", "busy", "threads", "crowded"),
    [
        (40, 0, 2, False),
        (34, 6, 2, False),  # 0.3 cores are busy
        (20, 20, 2, True),  # one is
        (20, 20, 1, False),
        (0, 40, 2, True),
        (0, 0, 2, False),  # the clock did not tick
    ],
)
def test_a_machine_with_fewer_free_cores_than_threads_is_crowded(
    monkeypatch: pytest.MonkeyPatch, idle: int, busy: int, threads: int, crowded: bool
) -> None:
    times = iter([(100, 100), (100 + idle, 100 + busy)])
    monkeypatch.setattr(provenance, "_core_times", lambda: next(times))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert provenance.is_crowded(0.0) is crowded


def test_a_machine_is_not_crowded_where_threads_sleep_or_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert not provenance.is_crowded(0.0)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if Path("/proc/stat").exists():
        assert provenance.is_crowded(0.05)  # more threads than cores
    for content in (OSError(), "cpu", "cpu a b c d e f"):

        def read(self: Path, content: object = content) -> object:
            if isinstance(content, OSError):
                raise content
            return content

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", read)
            assert not provenance.is_crowded(0.0)
