"""The Triton scan: in Triton's interpreter (another process), compiled for GPUs that are not here, and on one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ranvier import dynamics, kernels, nn
from ranvier.dynamics import (
    ATan,
    IFParams,
    LIFBParams,
    LIFParams,
    NeuronState,
    PLIFParams,
    Rectangle,
    Sigmoid,
    Triangle,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

INTERPRETED = Path(__file__).with_name("test_fused_scan.py")
PARAMS = {"if": IFParams, "lif": LIFParams, "plif": PLIFParams, "lifb": LIFBParams}
STEPS = {"if": dynamics.if_step, "lif": dynamics.lif_step, "plif": dynamics.plif_step, "lifb": dynamics.lifb_step}


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """Triton decides when it is imported whether it interprets, so this takes a Python that has not imported it yet."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)],
        env={**given, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_on_a_cpu_it_is_refused() -> None:
    """In a new process as well: this one may have been started in the interpreter."""
    code = (
        "import torch, ranvier as rv\n"
        "try:\n    rv.nn.LIF(implementation='triton')(torch.zeros(2, 1, 3))\n"
        "except RuntimeError as error:\n    print(error)"
    )
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.startswith('implementation="triton" cannot run on cpu: its kernels run on GPUs.')
    assert 'implementation="auto"' in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout


def compiled_for(capability: int, kernel: Any, given: dict[str, Any]) -> Any:
    """Compile ahead of time, given types of what comes at run time and values of what is constant."""
    from triton import compile as compile_ahead
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: value if isinstance(value, str) else "constexpr" for name, value in given.items()}
    signature = {name: types[name] for name in kernel.arg_names}
    wide = [
        index
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ("apart", "grad_apart", "numel", "columns")
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={name: given[name] for name in kernel.arg_names if signature[name] == "constexpr"},
        attrs={(index,): [["tt.divisibility", 16]] for index in wide},
    )
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return compile_ahead(source, target=GPUTarget("cuda", capability, 32), options=options)


CASES = [
    # neuron, tau, reset, surrogate, T, dtype, state, integer type
    ("lif", 2.0, "hard", Triangle(), 4, "*fp32", False, "i32"),
    ("lif", 3.0, "soft", ATan(), 16, "*bf16", True, "i32"),
    ("if", 1.0, "soft", Sigmoid(), 3, "*fp16", True, "i64"),
    ("plif", 1.0, "hard", ATan(), 8, "*fp32", True, "i32"),
    ("lifb", 2.0, "hard", Rectangle(), 4, "*bf16", False, "i64"),
    ("lifb", 2.0, "soft", Triangle(), 16, "*fp32", False, "i32"),
    ("if", 1.0, "hard", Triangle(), 32, "*fp32", False, "i32"),
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing compiles in the interpreter")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-T{case[4]}{case[5]}")
def test_compiles_for_gpus_that_are_not_here(
    case: tuple, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ranvier.kernels import fused_scan, triton_scan

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, tau, reset, surrogate, steps, dtype, with_state, integer = case
    constants = triton_scan._Constants.of(fused_scan.Kind(name, reset, True, "triangle", 0.5, 0.5, 1.0, tau))
    view = fused_scan.View(32, 4096, 32) if name == "lifb" else fused_scan.View(1, 2**20, 2**20)
    learns = name in ("plif", "lifb")
    forward, backward = triton_scan.Tile.of(view, steps), triton_scan.Tile.of(view, steps, 2 if learns else 1)
    function, number = fused_scan.SURROGATES[type(surrogate)]
    given = {
        "current": dtype,
        "state": "*fp32" if with_state else None,
        "rate": "*fp32" if name == "plif" else None,
        "excess": "*fp32" if name == "lifb" else None,
        "spikes": dtype,
        "end": "*fp32",
        "grad_spikes": dtype,
        "grad_end": "*fp32" if with_state else None,
        "grad_current": dtype,
        "grad_state": "*fp32" if with_state else None,
        "partial": "*fp32" if learns else None,
        **dict.fromkeys(("apart", "grad_apart", "numel", "rows", "columns", "inner"), integer),
        "column_blocks": "i32",
        "STEPS": steps,
        "CHARGE": constants.charge,
        "CHARGE_BACKWARD": constants.charge_backward,
        "RESET": constants.reset,
        "RESET_BACKWARD": constants.reset_backward,
        "DETACH": reset == "hard",
        "SURROGATE": triton_scan.DERIVATIVES[function],
        "SURROGATE_NUMBER": getattr(surrogate, number),
        "LEAK": constants.leak,
        "V_THRESHOLD": 0.5,
        "V_BURST": 1.0,
    }
    for kernel, tile in ((triton_scan._forward_kernel, forward), (triton_scan._backward_kernel, backward)):
        built = compiled_for(capability, kernel, {**given, "ROWS": tile.rows, "COLUMNS": tile.columns})
        assert built.asm["cubin"]
        assembly = built.asm["ptx"]
        assert f".target sm_{capability}" in assembly
        assert "fma.rn" not in assembly  # it would round once where the reference rounds twice
        assert ".local" not in assembly  # potentials of all steps are in registers, not in memory
        if steps <= 16:
            assert "ld.global.v" in assembly  # several values in one read
        assert ("div.rn.f32" in assembly) == (tau == 3)  # exact division, where a product is not as exact
        if kernel is triton_scan._backward_kernel and isinstance(surrogate, Triangle):
            assert "max.NaN.f32" in assembly  # as in torch's clamp; Triton's interpreter knows no other maximum


# On a GPU. The reference is computed on the CPU: there it divides, where eager CUDA multiplies with the inverse.


def moved(tensors: list[Tensor], device: str) -> list[Tensor]:
    return [tensor.detach().to(device).requires_grad_() for tensor in tensors]


def on_both(name: str, params: Any, current: Tensor, state: Tensor, learned: list[Tensor]) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(5)
    upstream = (
        torch.randn(current.shape, generator=generator).to(current.dtype),
        torch.randn(state.shape, generator=generator),
    )
    results = []
    for device, implementation in (("cuda", "triton"), ("cpu", "reference")):
        x, v, *parameters = moved([current, state, *learned], device)
        scan = getattr(kernels, f"{name}_scan")
        spikes, end = scan(x, NeuronState(v), params, *parameters, implementation=implementation)
        loss = (spikes * upstream[0].to(device)).float().sum() + (end.v * upstream[1].to(device)).sum()
        gradients = torch.autograd.grad(loss, [x, v, *parameters])
        results.append((spikes.cpu(), end.v.cpu(), [gradient.cpu() for gradient in gradients]))
    return results[0], results[1]


@on_a_gpu
@pytest.mark.parametrize(
    ("steps", "layout", "dtype"),
    [
        (1, "contiguous", torch.float16),
        (4, "channels last", torch.float32),
        (4, "contiguous", torch.bfloat16),
        (16, "contiguous", torch.float32),
        (33, "channels last", torch.float32),
    ],
)
@pytest.mark.parametrize("name", sorted(PARAMS))
def test_gpu_equals_the_reference(name: str, steps: int, layout: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(steps)
    current = (torch.randn(steps, 5, 12, 9, 7, generator=generator) + 0.4).to(dtype)
    if layout == "channels last":
        current = current.movedim(2, -1).contiguous().movedim(-1, 2)
    state = torch.randn(5, 12, 9, 7, generator=generator)
    learned = {"plif": [torch.tensor(0.0)], "lifb": [torch.arange(12) / 8 - 0.5]}.get(name, [])
    for reset, detach, surrogate in (("hard", True, Triangle()), ("soft", False, ATan()), ("soft", True, Sigmoid())):
        numbers = {"tau": 3.0} if name in ("lif", "lifb") else {}
        params = PARAMS[name](reset=reset, detach_reset=detach, surrogate=surrogate, **numbers)
        got, expected = on_both(name, params, current, state, learned)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert 0.05 < (got[0] != 0).float().mean() < 0.95
        rounding = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
        for index, (ours, theirs) in enumerate(zip(got[2], expected[2], strict=True)):
            largest = theirs.abs().max().item()
            if index > 1:  # learned: sums over everything, in which much cancels
                largest += expected[2][0].abs().sum().item() * 0.1
            torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding * largest)


@on_a_gpu
@pytest.mark.parametrize("name", sorted(PARAMS))
def test_gpu_equals_eager_and_streams(name: str) -> None:
    """With tau 2 the eager reference on the GPU agrees too. Sizes: many programs, and a tile that is not full."""
    current = torch.randn(6, 32, 48, 33, 17, device="cuda") + 0.4
    learned = {
        "plif": [torch.tensor(0.0, device="cuda")],
        "lifb": [torch.randn(48, device="cuda")],
    }.get(name, [])
    scan, params = getattr(kernels, f"{name}_scan"), PARAMS[name]()
    whole, end = scan(current, None, params, *learned, implementation="triton")
    expected, expected_end = scan(current, None, params, *learned, implementation="reference")
    assert torch.equal(whole, expected)
    assert torch.equal(end.v, expected_end.v)
    state, sent = None, []
    for part in current.split((1, 2, 3)):
        spikes, state = scan(part, state, params, *learned, implementation="triton")
        sent.append(spikes)
    assert torch.equal(torch.cat(sent), whole)
    assert state is not None
    assert torch.equal(state.v, end.v)


@on_a_gpu
@pytest.mark.parametrize("name", ["plif", "lifb"])
def test_gpu_gradients_are_the_same_bits_every_time(name: str) -> None:
    current = (torch.randn(4, 64, 32, 16, 16, device="cuda") + 0.4).requires_grad_()
    learned = torch.tensor(0.3, device="cuda") if name == "plif" else torch.rand(32, device="cuda")
    learned.requires_grad_()
    scan = getattr(kernels, f"{name}_scan")

    def gradients() -> tuple[Tensor, ...]:
        spikes, _ = scan(current, None, PARAMS[name](), learned, implementation="triton")
        return torch.autograd.grad(spikes.square().sum(), [current, learned])

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, gradients(), strict=True))


@on_a_gpu
def test_gpu_does_not_wait() -> None:
    """After a first call, which compiles, forward and backward read nothing back."""
    neuron = nn.LIFB(16, implementation="triton").cuda()
    plif = nn.PLIF(16, implementation="triton").cuda()
    current = torch.randn(4, 8, 16, 8, 8, device="cuda", requires_grad=True)
    plif(neuron(current)).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plif(neuron(current)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_gpu_network_compiles_whole() -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.TimeFolded(torch.nn.Linear(64, 256))
            self.lifb, self.lif = nn.LIFB(256, implementation="triton"), nn.LIF(implementation="triton")

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(self.lifb(self.linear(x)))

    network, x = Network().cuda(), torch.randn(4, 32, 64, device="cuda")
    expected = network(x)
    got = torch.compile(network, fullgraph=True)(x)
    assert torch.equal(got, expected)
    wanted = torch.autograd.grad(expected.sum(), list(network.parameters()))
    for ours, theirs in zip(torch.autograd.grad(got.sum(), list(network.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # products with the weights in another order


@on_a_gpu
def test_gpu_auto_picks_it_and_compiles_a_neuron_of_ones_own() -> None:
    current = torch.randn(3, 64, 2048, device="cuda")
    assert torch.equal(
        kernels.lif_scan(current, None, LIFParams())[0],
        kernels.lif_scan(current, None, LIFParams(), implementation="triton")[0],
    )
    unfit = lambda: None  # noqa: E731
    assert kernels.dispatch.choose_scan("auto", current.device, 64 * 2048, unfit).implementation == "triton"
    doubled, _ = kernels.lif_scan(current.double(), None, LIFParams())  # no kernel for float64: compiled
    assert doubled.dtype == torch.float64


@on_a_gpu
def test_gpu_offsets_pass_two_to_the_31() -> None:
    """More than 2^31 bytes and elements in bfloat16: 3 steps of 2^30 neurons, in 13 GB."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    current = torch.zeros(3, 1, 2**30, dtype=torch.bfloat16, device="cuda")
    current[:, :, -1000:] = torch.randn(3, 1, 1000, device="cuda").bfloat16() + 0.4
    spikes, state = kernels.lif_scan(current, None, LIFParams(), implementation="triton")
    expected, end = kernels.lif_scan(current[:, :, -1000:], None, LIFParams(), implementation="reference")
    assert torch.equal(spikes[:, :, -1000:], expected)
    assert torch.equal(state.v[:, -1000:], end.v)
    assert not spikes[:, :, :-1000].any()
