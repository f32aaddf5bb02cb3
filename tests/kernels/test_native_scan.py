"""What is special about the native kernels; that they compute the reference is in `test_fused_scan.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ranvier import kernels
from ranvier.dynamics import ATan, LIFBParams, LIFParams, PLIFParams, Sigmoid
from ranvier.kernels import native_library, native_scan

pytestmark = pytest.mark.skipif(native_scan.obstacle() is not None, reason=str(native_scan.obstacle()))


def lif(current: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    """Spikes and gradient of their sum of squares against a fixed pattern."""
    x = current.detach().requires_grad_()
    params = LIFParams(surrogate=ATan())
    spikes, _ = kernels.lif_scan(x, None, params, implementation=implementation)  # type: ignore[arg-type]
    pattern = torch.linspace(-1, 1, x[0].numel()).view_as(x[0]).to(x.dtype)
    return spikes.detach(), torch.autograd.grad((spikes * pattern).float().sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spare", [0, 3])
def test_outputs_larger_than_the_caches(dtype: torch.dtype, spare: int) -> None:
    """Written past them, where lines are whole, and like any other where they are not."""
    count = native_library.PAST_CACHES // (2 * dtype.itemsize) + spare
    generator = torch.Generator().manual_seed(0)
    current = (torch.randn(2, 1, count, generator=generator) + 0.4).to(dtype)
    assert current.numel() * current.element_size() >= native_library.PAST_CACHES
    spikes, gradient = lif(current, "native")
    expected, wanted = lif(current, "reference")
    assert torch.equal(spikes, expected)
    torch.testing.assert_close(gradient, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_input_that_is_not_aligned() -> None:
    current = torch.randn(3 * 5 * 1000 + 1)[1:].view(3, 5, 1000)
    assert current.data_ptr() % 64
    for got, expected in zip(lif(current, "native"), lif(current, "reference"), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["plif", "lifb"])
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    current = torch.randn(4, 40, 7, 200, generator=torch.Generator().manual_seed(0)) + 0.4
    assert current.numel() > native_library.ALONE
    gradients = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            learned = torch.full((7,), 1.5) if name == "lifb" else torch.tensor(0.2)
            learned.requires_grad_()
            params = LIFBParams() if name == "lifb" else PLIFParams()
            spikes, _ = getattr(kernels, f"{name}_scan")(current, None, params, learned, implementation="native")
            gradients.append(torch.autograd.grad((spikes * current).sum(), learned)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_exponential_far_from_the_threshold() -> None:
    """The sigmoid's slope is a tiny number there, then zero; never NaN or infinite."""
    current = torch.tensor([0.5, 1.0, 5.0, 40.0, 44.0, 80.0, 1e4, 1e30, -1e30]).view(1, 1, -1)
    slopes = []
    for implementation in ("native", "reference"):
        x = current.clone().requires_grad_()
        params = LIFParams(tau=1.0, v_threshold=0.5, surrogate=Sigmoid(4.0))
        spikes, _ = kernels.lif_scan(x, None, params, implementation=implementation)
        slopes.append(torch.autograd.grad(spikes.sum(), x)[0].flatten())
    ours, theirs = slopes
    torch.testing.assert_close(ours[:3], theirs[:3], rtol=1e-5, atol=0)
    assert (ours[3:] >= 0).all()
    assert (ours[3:] < 1e-30).all()


CODE = """
import sys, torch
from ranvier import kernels
from ranvier.dynamics import LIFParams
spikes, _ = kernels.lif_scan(torch.ones(2, 1, 2000), None, LIFParams(), implementation="native")
print(int(spikes.sum()))
"""


def test_two_processes_that_compile_at_once(tmp_path: Path) -> None:
    """Each finds the whole library or none; nothing is left over, and a third compiles nothing."""
    given = {**os.environ, "RANVIER_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", CODE], env=given, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate(timeout=300)[0].strip() for process in started] == ["4000"] * 2
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "kernels").iterdir()}
    assert made
    assert all(path.suffix == ".so" for path in made)
    subprocess.run([sys.executable, "-c", CODE], env=given, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kernels").iterdir()} == made


def test_a_damaged_library_is_compiled_anew(tmp_path: Path) -> None:
    """As a file that was being written when the machine lost power."""
    given = {**os.environ, "RANVIER_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", CODE], env=given, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "4000"
        for library in (tmp_path / "kernels").iterdir():
            library.write_bytes(library.read_bytes()[:100])


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = "import ranvier as rv\nprint(rv.explain('cpu'))"
    given = {**os.environ, "RANVIER_CACHE": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cpu: compiled (")
    assert "not native: " in done.stdout
    assert "cannot be written or read" in done.stdout
    assert "Set RANVIER_CACHE to another folder" in done.stdout


def test_the_source_is_part_of_the_package() -> None:
    assert native_scan.SOURCE.exists()
    assert native_scan.SOURCE.parent == Path(kernels.__file__).parent
