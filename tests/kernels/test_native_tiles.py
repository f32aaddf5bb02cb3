import pytest

from ranvier import provenance
from ranvier.kernels import native_tiles


def test_other_processors_are_told_by_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "processor_features", lambda: "x86_64 sse avx512f amx_tile amx_int8")
    assert native_tiles.obstacle.__wrapped__() == "this processor lacks amx_bf16, avx512bw, avx512vl, avx512_bf16."


def test_a_compiler_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "processor_features", lambda: " ".join(native_tiles.NEEDED))
    monkeypatch.setattr(provenance, "cpp_compiler", lambda: None)
    assert "apt-get install g++" in native_tiles.obstacle.__wrapped__()


def test_elsewhere_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_tiles.sys, "platform", "darwin")
    assert native_tiles.obstacle.__wrapped__() == "the use of AMX is asked of Linux."
