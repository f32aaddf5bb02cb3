"""Which implementation runs: said in words, refused with a reason, never silently another."""

import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ranvier import kernels, provenance
from ranvier.dynamics import LIFParams
from ranvier.kernels import Choice, choose, dispatch, explain, native_library, native_scan
from ranvier.kernels.dispatch import choose_scan

CPU = torch.device("cpu")
GPU = torch.device("cuda")
LARGE = dispatch.SMALL


@pytest.fixture(autouse=True)
def fresh_answers() -> Iterator[None]:
    """What was found out about compilers is remembered per process; forget it around every test."""
    answers = dispatch._obstacle, dispatch._fused_obstacle, dispatch._warn_once
    for remembered in answers:
        remembered.cache_clear()
    yield
    for remembered in answers:
        remembered.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "cpp_compiler", lambda: None)


@pytest.fixture
def a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can do everything, without running it."""
    monkeypatch.setattr(provenance, "cpp_compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(native_scan, "load", lambda source, defined: None)


@pytest.mark.usefixtures("a_compiler")
def test_auto_compiles_large_inputs_only() -> None:
    assert choose("auto", CPU, LARGE).implementation == "compiled"
    small = choose("auto", CPU, LARGE - 1)
    assert small.implementation == "reference"
    assert str(LARGE - 1) in small.reason


@pytest.mark.usefixtures("a_compiler")
@pytest.mark.parametrize("size", [1, LARGE])
def test_a_named_implementation_is_the_one_that_runs(size: int) -> None:
    assert choose("reference", CPU, size) == Choice("reference", "asked for")
    assert choose("compiled", CPU, size) == Choice("compiled", "asked for")


@pytest.mark.usefixtures("no_compiler")
def test_compiled_without_a_compiler_raises_and_says_why() -> None:
    with pytest.raises(
        RuntimeError, match=r'implementation="compiled" cannot run on cpu: .*needs a C\+\+ compiler.*g\+\+'
    ):
        kernels.lif_scan(torch.zeros(2, 1, 1), None, LIFParams(), implementation="compiled")


@pytest.mark.usefixtures("no_compiler")
def test_auto_without_a_compiler_falls_back_with_one_warning() -> None:
    current = torch.ones(1, 1, LARGE)
    with pytest.warns(RuntimeWarning, match=r"slower reference on cpu: .*C\+\+ compiler"):
        spikes, _ = kernels.lif_scan(current, None, LIFParams())
    kernels.lif_scan(current, None, LIFParams())  # a second warning would be an error
    assert (spikes == 1).all()  # 1 / 2 ties


@pytest.mark.usefixtures("no_compiler")
def test_no_warning_where_the_reference_would_run_anyway() -> None:
    kernels.lif_scan(torch.ones(1, 1, 1), None, LIFParams())  # a warning would be an error
    kernels.lif_scan(torch.ones(1, 1, LARGE), None, LIFParams(), implementation="reference")


@pytest.mark.parametrize("name", ["fast", "", "Compiled", "cuda"])
def test_unknown_name_raises(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"implementation is .* one of 'auto', 'reference', 'compiled', 'native', 'triton'"
    ):
        kernels.lif_scan(torch.zeros(2, 1, 1), None, LIFParams(), implementation=name)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"implementation is .* must be one of"):
        choose(name, CPU, 1)  # type: ignore[arg-type]


def test_names_agree_with_the_type() -> None:
    assert typing.get_args(dispatch.Implementation) == dispatch.IMPLEMENTATIONS


@pytest.mark.usefixtures("a_compiler")
@pytest.mark.parametrize("values", [LARGE - 1, LARGE])
def test_choice_does_not_depend_on_the_number_of_steps(values: int) -> None:
    """T calls of one step must run the code that one call of T steps runs."""
    choices = {choose("auto", CPU, dispatch.run_size(torch.empty(steps, 1, values))) for steps in (1, 2, 64)}
    assert len(choices) == 1


def test_run_size_is_that_of_one_step() -> None:
    assert dispatch.run_size(torch.empty(7, 2, 3, 5)) == 30
    assert dispatch.run_size(torch.empty(7, 0, 3)) == 0


@pytest.mark.usefixtures("a_compiler")
def test_explain() -> None:
    assert explain("cpu", values_per_step=LARGE).startswith("cpu: native (one kernel forward and one backward")
    assert explain(torch.device("cpu"), values_per_step=10).startswith("cpu: reference (10 values a step")


@pytest.mark.usefixtures("no_compiler")
def test_explain_names_the_obstacle_and_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "C++ compiler" in explain("cpu")


@pytest.mark.usefixtures("no_compiler")
def test_explain_leaves_the_warning_to_the_run_that_needs_it() -> None:
    explain("cpu")
    with pytest.warns(RuntimeWarning, match="slower reference"):
        choose("auto", CPU, LARGE)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())


def fits(backend: str) -> None:
    """A neuron that has a kernel."""


def has_none(backend: str) -> str:
    return "there is no kernel. Use another."


@pytest.mark.usefixtures("no_triton")
def test_gpu_without_triton_names_it() -> None:
    with pytest.raises(RuntimeError, match=r"cannot run on cuda: .*Triton.*pip install triton"):
        choose("compiled", GPU, LARGE)
    with pytest.raises(RuntimeError, match=r'"triton" cannot run on cuda: Triton is not installed.*pip install triton'):
        choose_scan("triton", GPU, LARGE, fits)
    with pytest.warns(RuntimeWarning, match=r"slower reference on cuda: .*pip install triton"):
        assert choose_scan("auto", GPU, LARGE, fits).implementation == "reference"
    assert "pip install triton" in explain("cuda")


@pytest.mark.usefixtures("triton")
def test_on_a_gpu_auto_picks_triton_where_it_pays_and_fits() -> None:
    assert choose_scan("auto", GPU, LARGE, fits).implementation == "triton"
    assert choose_scan("auto", GPU, LARGE - 1, fits).implementation == "reference"
    assert choose_scan("auto", GPU, LARGE, has_none).implementation == "compiled"


@pytest.mark.usefixtures("triton")
def test_on_a_gpu_a_network_is_compiled_whole() -> None:
    """What training asks: its neurons then fuse with what is around them."""
    assert choose("auto", GPU, 2**31).implementation == "compiled"
    assert choose("triton", GPU, 2**31).implementation == "triton"


@pytest.mark.usefixtures("triton", "a_compiler")
@pytest.mark.parametrize("size", [1, LARGE])
def test_asking_for_triton_gets_it_or_an_error(size: int) -> None:
    assert choose_scan("triton", GPU, size, fits) == Choice("triton", "asked for")
    with pytest.raises(RuntimeError, match=r'implementation="triton" cannot run on cuda: there is no kernel'):
        choose_scan("triton", GPU, size, has_none)
    assert choose_scan("reference", GPU, size, fits) == Choice("reference", "asked for")
    assert choose_scan("compiled", GPU, size, fits) == Choice("compiled", "asked for")


@pytest.mark.usefixtures("a_compiler")
def test_on_a_cpu_auto_picks_native_where_it_pays_and_fits() -> None:
    def asked(backend: str) -> None:
        assert backend == "native"

    few = dispatch.PAYS["native"]
    assert choose_scan("auto", CPU, few, asked).implementation == "native"
    assert choose_scan("auto", CPU, few - 1, asked).implementation == "reference"
    assert choose_scan("auto", CPU, LARGE, has_none).implementation == "compiled"
    assert choose_scan("auto", CPU, few, has_none).implementation == "reference"
    assert choose("auto", CPU, 2**31).implementation == "compiled"  # networks


@pytest.mark.usefixtures("no_compiler")
def test_native_without_a_compiler_raises_and_says_why() -> None:
    with pytest.raises(
        RuntimeError, match=r'"native" cannot run on cpu: they need a C\+\+ compiler.*apt-get install g\+\+'
    ):
        choose_scan("native", CPU, LARGE, fits)


@pytest.mark.usefixtures("a_compiler")
def test_native_does_not_run_on_a_gpu() -> None:
    with pytest.raises(RuntimeError, match='"native" cannot run on cuda: its kernels run on CPUs'):
        choose_scan("native", GPU, LARGE, fits)


def test_a_compiler_that_fails_is_named_and_auto_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'a.cpp: error: no such instruction' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("RANVIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(provenance, "cpp_compiler", lambda: str(broken))
    native_library.load.cache_clear()
    native_library._compiler_version.cache_clear()
    assert "compiling them failed: a.cpp: error: no such instruction" in str(native_scan.obstacle())
    assert choose_scan("auto", CPU, 2**10, fits).implementation == "reference"
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []
    native_library._compiler_version.cache_clear()


@pytest.mark.usefixtures("triton")
def test_explain_on_a_gpu_names_triton_and_what_is_compiled() -> None:
    said = explain("cuda", values_per_step=LARGE)
    assert said.startswith("cuda: triton (one kernel forward and one backward run all steps")
    assert "compiled: networks as a whole" in said
    assert explain("cuda", values_per_step=10).startswith("cuda: reference (10 values")


def test_untested_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match="cannot run on meta: compiling has not been tested on meta"):
        choose("compiled", torch.device("meta"), LARGE)


def test_a_torch_without_limits_of_its_own_for_each_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11: what it does not know is not handed to it, and the limit for all is raised."""
    seen: dict[str, Any] = {}

    def compile_(model: Any, *, fullgraph: bool = False, dynamic: bool | None = None) -> Any:
        seen["fullgraph"] = fullgraph
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would leave torch without the setting
        assert dispatch.compile_whole(abs) is abs
        assert seen == {"fullgraph": True}
        assert torch._dynamo.config.recompile_limit == dispatch.RECOMPILE_LIMIT
    with torch._dynamo.config.patch(recompile_limit=1000):
        dispatch.compile_whole(abs)
        assert torch._dynamo.config.recompile_limit == 1000
