"""The Triton kernel of converted neurons: in Triton's interpreter (another process), compiled ahead, and on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranvier import dynamics, kernels
from ranvier.dynamics import ConvertedState
from ranvier.kernels.converted import Converted

from .test_triton_scan import compiled_for

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETED, reason="this is the process that the test starts")
def test_in_the_interpreter() -> None:
    given = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**given, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout


def drawn(seed: int, channels: int, rows: int, frame: tuple[int, ...], **kind: bool) -> Converted:
    generator = torch.Generator().manual_seed(seed)
    return Converted(
        torch.rand(channels, generator=generator) + 0.1,
        torch.rand(rows, channels, generator=generator) - 0.5,
        torch.rand(channels, *frame, generator=generator),
        **kind,
    )


def assert_equal(got: tuple[Any, ConvertedState], expected: tuple[Any, ConvertedState]) -> None:
    for ours, theirs in ((got[0], expected[0]), (got[1].v, expected[1].v), (got[1].emitted, expected[1].emitted)):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs)
    assert got[1].step == expected[1].step


@pytest.mark.skipif(not IS_INTERPRETED, reason="runs in a process of its own, which interprets")
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    steps=st.integers(1, 4),
    channels=st.sampled_from([1, 2, 5, 17]),
    frame=st.sampled_from([(), (3,), (3, 5)]),
    is_last=st.booleans(),
    varies=st.booleans(),
    each=st.booleans(),
    signed=st.booleans(),
    binary=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_two_calls_are_those_of_the_reference(
    seed: int,
    steps: int,
    channels: int,
    frame: tuple[int, ...],
    is_last: bool,
    varies: bool,
    each: bool,
    signed: bool,
    binary: bool,
    dtype: torch.dtype,
) -> None:
    neurons = drawn(seed, channels, 2 * steps if varies else 1, frame if each else (), signed=signed, binary=binary)
    if dtype == torch.bfloat16:  # the interpreter cuts bits off where a GPU rounds: send what needs no rounding
        neurons = neurons._replace(threshold=2.0 ** neurons.threshold.mul(4).floor())
    state: Any = None
    after: Any = None
    for call in range(2):
        generator = torch.Generator().manual_seed(seed + 1 + call)
        current = torch.randn(steps, 3, channels, *frame, generator=generator).to(dtype)
        if is_last:
            current = current.movedim(2, -1).contiguous().movedim(-1, 2)
        got = kernels.converted_scan(current, state, *neurons, implementation="triton")
        expected = dynamics.converted_scan(current, after, *neurons)
        assert_equal(got, expected)
        state, after = got[1], expected[1]


@pytest.mark.skipif(not IS_INTERPRETED, reason="runs in a process of its own, which interprets")
def test_more_steps_than_one_launch_and_nothing_to_run_on() -> None:
    neurons = drawn(0, 5, 40, (), signed=True, binary=False)
    current = torch.randn(40, 2, 5, 3, generator=torch.Generator().manual_seed(1))
    got = kernels.converted_scan(current, None, *neurons, implementation="triton")
    assert_equal(got, dynamics.converted_scan(current, None, *neurons))
    none = kernels.converted_scan(current[:, :0], None, *neurons, implementation="triton")
    assert_equal(none, dynamics.converted_scan(current[:, :0], None, *neurons))


@pytest.mark.skipif(IS_INTERPRETED, reason="nothing compiles in the interpreter")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("steps", "dtype", "signed", "begun"),
    [(4, "*fp32", False, False), (16, "*bf16", True, True), (1, "*fp16", False, True)],
)
def test_compiles_for_gpus_that_are_not_here(
    capability: int,
    steps: int,
    dtype: str,
    signed: bool,
    begun: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ranvier.kernels import triton_converted
    from ranvier.kernels.fused_scan import View
    from ranvier.kernels.triton_scan import Tile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = Tile.of(View(32, 4096, 32), steps)
    given = {
        **dict.fromkeys(("current", "sent"), dtype),
        **dict.fromkeys(("threshold", "bias", "v_end"), "*fp32"),
        "v": "*fp32" if begun else None,
        "v_init": None if begun else "*fp32",
        "emitted": "*fp32" if begun and signed else None,
        "emitted_end": "*fp32" if signed else None,
        **dict.fromkeys(("apart", "numel", "rows", "columns", "inner"), "i64"),
        **dict.fromkeys(("bias_apart", "column_blocks"), "i32"),
        "STEPS": steps,
        "SIGNED": signed,
        "BINARY": begun,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }
    assembly = compiled_for(capability, triton_converted._kernel, given).asm["ptx"]
    assert f".target sm_{capability}" in assembly
    assert "fma.rn" not in assembly
    assert ".local" not in assembly
    assert "ld.global.v" in assembly


@on_a_gpu
@pytest.mark.parametrize("signed", [False, True])
def test_gpu_equals_the_reference(signed: bool) -> None:
    for steps, frame in ((4, (9, 7)), (33, (5, 5))):
        neurons = drawn(steps, 48, steps, (), signed=signed, binary=False)
        current = torch.randn(steps, 32, 48, *frame, generator=torch.Generator().manual_seed(2))
        moved = [each.cuda() for each in neurons[:3]]
        got = kernels.converted_scan(current.cuda(), None, *moved, signed, implementation="auto")
        assert_equal(got, dynamics.converted_scan(current, None, *neurons))
