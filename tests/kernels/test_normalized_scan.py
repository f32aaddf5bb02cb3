"""Normalisation and neuron as one operator, against both in double precision, one after the other."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ranvier import dynamics
from ranvier.dynamics import ATan, IFParams, LIFBParams, LIFParams, PLIFParams, Sigmoid, Triangle
from ranvier.kernels import native_scan
from ranvier.kernels.fused_scan import Kind
from ranvier.kernels.normalized_scan import _operator, fits, normalized_scan

pytestmark = pytest.mark.skipif(native_scan.obstacle() is not None, reason=str(native_scan.obstacle()))
EPS = 1e-5
NEURONS: dict[str, tuple[Any, Any, Any, tuple[Tensor, ...]]] = {
    "if": (dynamics.if_step, dynamics.if_scan, IFParams(0.8, "soft", False, ATan()), ()),
    "lif": (dynamics.lif_step, dynamics.lif_scan, LIFParams(0.5, "hard", True, Triangle(), 2.0), ()),
    "lif, tau 3": (dynamics.lif_step, dynamics.lif_scan, LIFParams(0.4, "hard", False, Sigmoid(), 3.0), ()),
    "plif": (dynamics.plif_step, dynamics.plif_scan, PLIFParams(0.5, "soft", True, Triangle()), (torch.tensor(0.3),)),
    "lifb": (
        dynamics.lifb_step,
        dynamics.lifb_scan,
        LIFBParams(0.5, "hard", True, Triangle(), 2.0),
        (torch.linspace(1, 2, 32),),
    ),
}


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


def inputs(steps: int = 4, batch: int = 5, channels: int = 32, *sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(steps)
    x = channels_last(3 * torch.randn(steps, batch, channels, *sizes, generator=generator) + 2)
    return x, torch.linspace(0.5, 1.5, channels), torch.linspace(-0.4, 0.4, channels)


def apart(scan: Any, params: Any, per_step: bool, x: Tensor, weight: Tensor, bias: Tensor, *learned: Tensor) -> Tensor:
    """Spikes, in the precision of `x`."""
    parts = x.unbind(0) if per_step else [x.flatten(0, 1)]
    y = torch.cat([F.batch_norm(part, None, None, weight, bias, True, 0.0, EPS) for part in parts])
    spikes: Tensor = scan(y.unflatten(0, x.shape[:2]), None, params, *learned)[0]
    return spikes


def moments(x: Tensor, per_step: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance in double precision, `[S, C]`."""
    each = x.detach().double().movedim(2, 1).flatten(2)  # [T, C, B and positions]
    each = each if per_step else each.movedim(0, 1).flatten(1).unsqueeze(0)
    return each.mean(2), each.var(2, correction=0)


@pytest.mark.parametrize("steps", [1, 4, 40])  # 40: more than loops are unrolled for
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("sizes", [(), (6, 5)])
@pytest.mark.parametrize("name", NEURONS)
def test_agrees_with_both_in_double_precision(name: str, sizes: tuple[int, ...], per_step: bool, steps: int) -> None:
    step, scan, params, learned = NEURONS[name]
    ours = [tensor.clone().requires_grad_() for tensor in (*inputs(steps, 5, 32, *sizes), *learned)]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    assert fits(*ours[:3], step, params, *ours[3:], implementation="native")
    spikes, *found = normalized_scan(*ours[:3], EPS, per_step, step, params, *ours[3:])
    expected = apart(scan, params, per_step, *theirs)
    assert torch.equal(spikes.double(), expected)
    assert 0.02 < (spikes > 0).float().mean() < 0.9
    # A variance of five numbers may be small beside the squares, some 30, of which it is a difference.
    for one, correct, atol in zip(found, moments(theirs[0], per_step), (1e-6, 5e-6 if per_step else 0), strict=True):
        torch.testing.assert_close(one.double(), correct, rtol=1e-5, atol=atol)
    mean = found[0]
    assert not mean.requires_grad
    upstream = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(spikes, ours, upstream)
    wanted = torch.autograd.grad(expected, theirs, upstream.double())
    for gradient, correct in zip(gradients, wanted, strict=True):
        assert gradient.shape == correct.shape
        error = (gradient.double() - correct).norm() / correct.norm()
        assert error < 1e-5  # float32 beside float64, sums of up to 6,000 numbers


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("name", NEURONS)
def test_bfloat16_is_rounded_only_where_it_is_stored(name: str, per_step: bool) -> None:
    step, _, params, learned = NEURONS[name]
    x, weight, bias = inputs(4, 8, 32, 4, 4)
    x = x.bfloat16()
    wide = x.float().requires_grad_()
    narrow = x.clone().requires_grad_()
    spikes, mean, _ = normalized_scan(narrow, weight, bias, EPS, per_step, step, params, *learned)
    expected, wide_mean, _ = normalized_scan(wide, weight, bias, EPS, per_step, step, params, *learned)
    assert spikes.dtype == torch.bfloat16
    assert torch.equal(spikes, expected.bfloat16())
    assert torch.equal(mean, wide_mean)
    (gradient,) = torch.autograd.grad(spikes.float().square().sum(), narrow)
    (correct,) = torch.autograd.grad(expected.square().sum(), wide)
    assert gradient.dtype == torch.bfloat16
    assert (gradient.float() - correct).norm() < 0.01 * correct.norm()  # two roundings to 8 bits


@pytest.mark.parametrize("per_step", [False, True])
def test_variance_far_from_zero(per_step: bool) -> None:
    """Squares of numbers around 1,000 would leave float32 no digits of a variance of 1."""
    x = channels_last(1000 + torch.randn(4, 64, 16, 4, 4, generator=torch.Generator().manual_seed(0)))
    if per_step:  # and far from those of the other steps
        x = x * 10.0 ** -torch.arange(4).view(4, 1, 1, 1, 1)
    step, _, params, _ = NEURONS["lif"]
    _, *found = normalized_scan(x, torch.ones(16), torch.zeros(16), EPS, per_step, step, params)
    for one, correct, rtol in zip(found, moments(x, per_step), (1e-6, 1e-4), strict=True):
        torch.testing.assert_close(one.double(), correct, rtol=rtol, atol=0)


@pytest.mark.parametrize("per_step", [False, True])
def test_steps_that_are_one_tensor(per_step: bool) -> None:
    """A constant image passes the encoder once, and its steps share memory."""
    step, scan, params, _ = NEURONS["lif"]
    x, weight, bias = inputs(1, 6, 32, 4, 4)
    x.requires_grad_()
    spikes, _, _ = normalized_scan(x.expand(4, -1, -1, -1, -1), weight, bias, EPS, per_step, step, params)
    wide = x.detach().double().requires_grad_()
    expected = apart(scan, params, per_step, wide.expand(4, -1, -1, -1, -1), weight.double(), bias.double())
    assert torch.equal(spikes.double(), expected)
    upstream = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(spikes, x, upstream)
    (correct,) = torch.autograd.grad(expected, wide, upstream.double())
    assert (gradient.double() - correct).norm() < 1e-5 * correct.norm()


@pytest.mark.parametrize("per_step", [False, True])
def test_threads_change_no_bit(per_step: bool) -> None:
    step, _, params, learned = NEURONS["lifb"]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            given = [tensor.clone().requires_grad_() for tensor in (*inputs(4, 16, 32, 16, 16), *learned)]
            spikes, *found = normalized_scan(*given[:3], EPS, per_step, step, params, *given[3:])
            results.append((spikes, *found, *torch.autograd.grad(spikes.square().sum(), given)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_what_fits() -> None:
    step, _, params, _ = NEURONS["lif"]
    x, weight, bias = inputs(4, 16, 32, 8, 8)

    def answer(x: Tensor, weight: Tensor = weight, implementation: Any = "auto", params: Any = params) -> bool:
        return fits(x, weight, bias, step, params, implementation=implementation)

    class Own(Triangle):
        pass

    assert answer(x)
    assert answer(x.bfloat16())
    assert answer(x, implementation="native")
    assert not answer(x, implementation="compiled")
    assert not answer(x, implementation="reference")
    assert not answer(x.contiguous())  # rows of pixels
    assert not answer(x[:, :, :24])
    assert not answer(x.double())
    assert not answer(x, weight.bfloat16())
    assert not answer(x[:, :0])
    assert not answer(x, params=LIFParams(0.5, "hard", True, Own(), 2.0))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("per_step", [False, True])
def test_is_an_operator(per_step: bool, adds: bool) -> None:
    for name in NEURONS:
        step, _, params, learned = NEURONS[name]
        kind = Kind.of(step, params)
        rate = torch.tensor([0.6], requires_grad=True) if kind.neuron == "plif" else None
        excess = (learned[0] - 1).requires_grad_() if kind.neuron == "lifb" else None
        x, weight, bias = (tensor.requires_grad_() for tensor in inputs(4, 6, 32, 4, 4))
        added = torch.randn_like(x).requires_grad_() if adds else None
        checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(
            _operator, (x, weight, bias, added, rate, excess, EPS, per_step, *kind), test_utils=checks
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("layout", ["as x", "rows of pixels", "one step"])
def test_what_is_added_comes_with_the_spikes(layout: str, name: str, dtype: torch.dtype) -> None:
    """Bit for bit what an addition afterwards gives; its gradient is that of the sum, and no other changes."""
    step, _, params, learned = NEURONS[name]
    x, weight, bias = inputs(4, 5, 32, 6, 5)
    x = x.to(dtype)
    added = torch.randn(1 if layout == "one step" else 4, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    added = added.to(dtype) if layout == "rows of pixels" else channels_last(added.to(dtype))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    for afterwards in (False, True):
        given = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, added, *learned)]
        wide = given[3].expand_as(x)
        spikes, *_ = normalized_scan(
            *given[:3], EPS, True, step, params, *given[4:], added=None if afterwards else wide
        )
        total = spikes + wide if afterwards else spikes
        gradients = torch.autograd.grad(total, given, upstream)
        if afterwards:  # what a burst sends is not rounded before
            exact, *_ = normalized_scan(x.float(), weight, bias, EPS, True, step, params, *learned)
            total = (exact + wide.float()).to(dtype)
        results.append((total, *gradients))
    assert results[0][0].stride() == x.stride()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_compiles_whole() -> None:
    step, _, params, _ = NEURONS["lif"]
    results = []
    for run in (normalized_scan, torch.compile(normalized_scan, fullgraph=True)):
        given = [tensor.requires_grad_() for tensor in inputs(4, 16, 32, 8, 8)]
        spikes, *found = run(*given, EPS, False, step, params)
        total, *_ = run(*given, EPS, False, step, params, added=given[0])
        results.append((spikes, total, *found, *torch.autograd.grad((spikes * total).sum(), given)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
