"""Which convolutions are taken for those of spikes, and that all around them stays as it was."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from ranvier.kernels import convolution as module
from ranvier.kernels import native_convolution, native_event_convolution
from ranvier.kernels.convolution import (
    _backward_operator,
    _operator,
    _share_of_events,
    convolution,
    convolve,
    differentiate,
    explain_convolutions,
    fits,
    prefers_events,
)

needs_unit = pytest.mark.skipif(native_convolution.obstacle() is not None, reason=str(native_convolution.obstacle()))
needs_kernels = pytest.mark.skipif(
    None not in (native_convolution.obstacle(), native_event_convolution.obstacle()),
    reason=str(native_event_convolution.obstacle()),
)
PLAIN: tuple[Any, ...] = ([1, 1], [1, 1])


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def layer(spikes: bool = True, images: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 32, 6, 5, generator=generator)
    return channels_last((x > 1).float() if spikes else x), channels_last(
        torch.randn(64, 32, 3, 3, generator=generator)
    )


def gradients(function: Callable[..., Tensor], x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y.detach(), *torch.autograd.grad(y, (x, weight), channels_last(upstream))


@needs_unit
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_are_those_of_the_unit(compiled: bool) -> None:
    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return convolution(x, weight, None, *PLAIN)

    x, weight = layer()
    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    got = gradients(run, x, weight)
    wanted = gradients(lambda x, weight: torch.conv2d(x, weight, None, *PLAIN), x, weight)
    for one, other in zip(got, wanted, strict=True):
        assert one.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert torch.equal(got[0], native_convolution.forward(x, weight, None, *PLAIN))  # type: ignore[arg-type]


@needs_unit
@pytest.mark.parametrize("images", [40, 4])
@pytest.mark.parametrize("spikes", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_all_else_is_the_convolution_of_torch_to_the_bit(spikes: bool, images: int, compiled: bool) -> None:
    if spikes and images == 40:
        pytest.skip("is the unit's")
    x, weight = layer(spikes, images)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return convolution(x, weight, None, *PLAIN)

    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    got = gradients(run, x, weight)
    wanted = gradients(lambda x, weight: torch.conv2d(x, weight, None, *PLAIN), x, weight)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@needs_unit
def test_late_digits_are_seen_though_the_first_values_are_spikes() -> None:
    x, weight = layer()
    x[-1, -1, -1, -1] = 0.1
    wanted = gradients(lambda x, weight: torch.conv2d(x, weight, None, *PLAIN), x, weight)
    got = gradients(lambda x, weight: convolution(x, weight, None, *PLAIN), x, weight)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def in_bfloat16(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Output and gradients under autocast, of leaves in float32 but x."""
    given = [one.clone().requires_grad_() for one in (x, weight, bias) if one is not None]
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*given) if bias is not None else function(*given, None)
    upstream = channels_last(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return [y.detach(), *torch.autograd.grad(y, given, upstream)]


@needs_unit
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("size", "passes"), [(8, (True, True, True)), (16, (False, False, True)), (20, (False,) * 3)])
def test_in_bfloat16_each_pass_runs_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, size: int, passes: tuple[bool, ...], compiled: bool, biased: bool
) -> None:
    """Of analog values, too. Under autocast torch rounds alike, and the gradient of the weights besides."""
    generator = torch.Generator().manual_seed(2)
    x = channels_last(torch.randn(32, 64, size, size, generator=generator).bfloat16())
    weight = channels_last(torch.randn(64, 64, 3, 3, generator=generator) / 24)
    bias = torch.randn(64, generator=generator) if biased else None
    wanted = in_bfloat16(lambda x, w, b: torch.conv2d(x, w, b, *PLAIN), x, weight, bias)
    ran: list[str] = []
    for name in ("forward", "grad_spikes", "grad_weight"):
        run = getattr(native_convolution, name)
        monkeypatch.setattr(
            native_convolution, name, lambda *given, run=run, name=name: ran.append(name) or run(*given)
        )

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert fits(x, weight, None, (1, 1), 1)
        return convolution(x, weight, bias, *PLAIN)

    torch._dynamo.reset()
    found = in_bfloat16(torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours, x, weight, bias)
    assert [name in ran for name in ("forward", "grad_spikes", "grad_weight")] == list(passes)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=2.0**-7, atol=2.0**-7 * float(other.abs().max()))
    exact = torch.ops.aten.convolution_backward(
        channels_last(torch.randn(wanted[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()).double(),
        *(x.double(), weight.double(), None, *PLAIN, [1, 1], False, [0, 0], 1, [False, True, False]),
    )[1]
    assert passes[2] == ((found[2] - exact).abs().max() < 1e-5 * exact.abs().max())  # not rounded to bfloat16


@needs_unit
def test_weights_of_bfloat16() -> None:
    """As in a network that is cast as a whole: everything is bfloat16."""
    generator = torch.Generator().manual_seed(3)
    x = channels_last(torch.randn(40, 32, 6, 5, generator=generator).bfloat16())
    weight = channels_last(torch.randn(64, 32, 3, 3, generator=generator).bfloat16())
    bias = torch.randn(64, generator=generator).bfloat16()
    leaves = [one.clone().requires_grad_() for one in (x, weight, bias)]
    results = []
    for run in (torch.conv2d, convolution):
        y = run(*leaves, *PLAIN)
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)])
    for other, one in zip(*results, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=2.0**-6, atol=2.0**-6 * float(other.abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        assert fits(x, weight, None, (1, 1), 1)
    with torch.autocast("cpu", torch.float16):
        assert not fits(x, weight, None, (1, 1), 1)
    assert not fits(x, weight.float(), None, (1, 1), 1)  # which torch refuses


@needs_unit
def test_a_bias_of_another_dtype_does_not_fit() -> None:
    """A compiled graph has no autocast around it that would cast both."""
    x, weight = layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert fits(x.bfloat16(), weight, torch.zeros(64), (1, 1), 1)
        assert not fits(x.bfloat16(), weight.bfloat16(), torch.zeros(64), (1, 1), 1)


@needs_unit
@pytest.mark.parametrize("images", [8, 32])
def test_strides_over_a_few_places(images: int) -> None:
    """Torch has NaN among the gradients of weights, or any number, in most runs. For 32 images ours runs."""
    generator = torch.Generator().manual_seed(5)
    x = channels_last(torch.randn(images, 64, 1, 1, generator=generator).bfloat16())
    weight, bias = torch.randn(64, 64, 3, 3, generator=generator), torch.randn(64, generator=generator)
    where = [2, 2], [1, 1]
    for autocast in (False, True):
        leaves = [one.clone().requires_grad_() for one in ((x, weight, bias) if autocast else (x, weight.bfloat16()))]
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = convolution(leaves[0], leaves[1], leaves[2] if autocast else None, *where)
            found = torch.autograd.grad(y.float().sum(), leaves)
            exact = torch.ops.aten.convolution_backward(
                *(torch.ones_like(y).double(), x.double(), weight.bfloat16().double(), [64]),
                *(*where, [1, 1], False, [0, 0], 1, [True] * 3),
            )
            for one, other in zip(found, exact[: len(leaves)], strict=True):
                torch.testing.assert_close(one.double(), other, rtol=2.0**-7, atol=2.0**-7 * float(other.abs().max()))


@needs_kernels
def test_forward_mode_differentiation_of_backward_alone() -> None:
    x, weight = layer()
    tangents = []
    for run in (torch.conv2d, convolution):
        leaf = weight.clone().requires_grad_()
        y = run(x, leaf, None, *PLAIN)
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(torch.ones_like(y), y.detach())
            tangents.append(forward_ad.unpack_dual(torch.autograd.grad(y, leaf, grad)[0]).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-4, atol=1e-2)


@needs_kernels
def test_gradients_of_gradients() -> None:
    x, weight = layer()

    def twice(function: Callable[..., Tensor]) -> Tensor:
        w = weight.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x, w).square().mean(), w, create_graph=True)
        return torch.autograd.grad(first.square().sum(), w)[0]

    wanted = twice(lambda x, w: torch.conv2d(x, w, None, *PLAIN))
    torch.testing.assert_close(twice(lambda x, w: convolution(x, w, None, *PLAIN)), wanted, rtol=1e-4, atol=1e-6)


@needs_kernels
def test_only_the_gradients_that_are_needed() -> None:
    x, weight = layer()
    grad = torch.ones_like(convolve(x, weight, None, *PLAIN, learned=True))
    for needed in ([True, False, True], [False, True, False], [False, False, True]):
        found = differentiate(grad, x, weight, *PLAIN, needed)
        assert [one is not None for one in found] == needed
    whole = torch.autograd.grad(convolution(x.requires_grad_(), weight, None, *PLAIN).sum(), x)
    assert torch.equal(whole[0], differentiate(grad, x.detach(), weight, *PLAIN, [True, False, False])[0])  # type: ignore[arg-type]


@needs_kernels
def test_operators_keep_their_promises() -> None:
    x, weight = layer()
    torch.library.opcheck(_operator, (x.requires_grad_(), weight.requires_grad_(), torch.ones(64), *PLAIN, True))
    grad = channels_last(torch.ones(40, 64, 6, 5))
    torch.library.opcheck(_backward_operator, (grad, x.detach(), weight.detach(), *PLAIN, [True, False, True]))
    torch.library.opcheck(
        _backward_operator, (grad.bfloat16(), x.detach().bfloat16(), weight.detach(), *PLAIN, [True, True, True])
    )


@needs_kernels
def test_where_it_does_not_fit() -> None:
    x, weight = layer()
    assert fits(x, weight, None, (1, 1), 1)
    assert not fits(x, weight, None, (2, 1), 1)
    assert not fits(x, weight[:, :16], None, (1, 1), 2)
    assert not fits(x.contiguous(), weight, None, (1, 1), 1)
    assert not fits(x.double(), weight.double(), None, (1, 1), 1)
    assert not fits(x.to("meta"), weight.to("meta"), None, (1, 1), 1)
    assert not fits(x[0], weight, None, (1, 1), 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits(x, weight, None, (1, 1), 1)
    seen: list[bool] = []
    torch.func.vmap(lambda one: seen.append(fits(one, weight, None, (1, 1), 1)) or one)(x.unsqueeze(0))
    assert seen == [False]


@needs_kernels
@pytest.mark.parametrize(
    "wrong",
    [
        {"channels": 48},
        {"height": 0},
        {"height": 2, "padding": 0},
        {"padding": -1},
        {"stride": 0},
        {"bias": torch.ones(64, dtype=torch.float64)},
        {"bias": torch.ones(32)},
    ],
    ids=str,
)
@pytest.mark.parametrize("compiled", [False, True])
def test_what_torch_refuses_is_refused(wrong: dict[str, Any], compiled: bool) -> None:
    x = channels_last(torch.ones(40, wrong.get("channels", 32), wrong.get("height", 6), 5))
    weight, bias = torch.ones(64, 32, 3, 3), wrong.get("bias")
    where = [wrong.get("stride", 1)] * 2, [wrong.get("padding", 1)] * 2
    with pytest.raises(RuntimeError):
        torch.conv2d(x, weight, bias, *where)

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolution(x, weight, bias, *where)

    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    with pytest.raises((RuntimeError, ZeroDivisionError) if compiled else RuntimeError):
        run(x, weight, bias)


@needs_kernels
@pytest.mark.parametrize("bias", [torch.ones(1).expand(64), torch.arange(128.0)[::2], torch._neg_view(torch.ones(64))])
def test_any_memory(bias: Tensor) -> None:
    x, weight = layer()
    wanted = torch.conv2d(x, weight, bias, *PLAIN)
    torch.testing.assert_close(convolution(x, weight, bias, *PLAIN), wanted, rtol=1e-5, atol=1e-4)
    for other in (weight.contiguous(), torch._neg_view(-weight)):
        torch.testing.assert_close(convolution(x, other, bias, *PLAIN), wanted, rtol=1e-5, atol=1e-4)
    few = torch.conv2d(x[:0], weight, bias, *PLAIN)
    assert convolution(x[:0], weight, bias, *PLAIN).shape == few.shape


@needs_kernels
def test_the_type_of_new_tensors_does_not_matter() -> None:
    x, weight = layer()
    wanted = convolution(x, weight, None, *PLAIN)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found = convolution(x, weight, None, *PLAIN)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, wanted)
    with torch.device("meta"):
        assert torch.equal(convolution(x, weight, None, *PLAIN), wanted)


@needs_kernels
def test_one_graph_takes_any_number_of_images() -> None:
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    run = torch.compile(lambda x, weight: convolution(x, weight, None, *PLAIN), fullgraph=True, backend=count)
    for images in (40, 64, 33, 50, 35):
        run(*layer(images=images))
    assert len(graphs) == 2  # the second for any number


@needs_kernels
def test_forward_mode() -> None:
    x, weight = layer()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), forward_ad.dual_level():
            assert not fits(x, weight, None, (1, 1), 1)


@needs_kernels
def test_an_operator_in_a_fresh_process_asks_for_the_unit() -> None:
    code = """
import torch, ranvier.kernels.convolution
x = torch.ones(64, 32, 5, 5).to(memory_format=torch.channels_last)
y = torch.ops.ranvier.convolution(x, torch.ones(64, 32, 3, 3), None, [1, 1], [1, 1], False)
print(int(y.max()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "288\n"), done.stderr


def test_without_kernels_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_convolution, "obstacle", lambda: "this processor lacks amx_bf16.")
    monkeypatch.setattr(native_event_convolution, "obstacle", lambda: "this processor lacks fma.")
    assert not fits(*layer(), None, (1, 1), 1)
    assert explain_convolutions() == "those of torch; this processor lacks fma. (this processor lacks amx_bf16.)"


# --------------------------------------------------------------------------------------------- events, where no unit is


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each gradient of weights that was asked of it, whether it was found by listing events."""
    if native_event_convolution.obstacle() is not None:
        pytest.skip(str(native_event_convolution.obstacle()))
    monkeypatch.setattr(native_convolution, "obstacle", lambda: "this processor lacks amx_bf16.")
    asked: list[bool] = []
    find = native_event_convolution.grad_weight

    def count(*arguments: Any, **options: Any) -> Tensor | None:
        found = find(*arguments, **options)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(native_event_convolution, "grad_weight", count)
    return asked


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_of_weights_read_events_alone(lists: list[bool], compiled: bool, biased: bool) -> None:
    x, weight = layer()
    bias = torch.randn(64, generator=torch.Generator().manual_seed(3)).requires_grad_() if biased else None

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return convolution(x, weight, bias, *PLAIN)

    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    got = gradients(run, x, weight)
    wanted = gradients(lambda x, weight: torch.conv2d(x, weight, bias, *PLAIN), x, weight)
    assert lists == [True]
    assert torch.equal(got[1], wanted[1])  # the gradient of x is that of torch
    for place in (0, 2):
        torch.testing.assert_close(got[place], wanted[place], rtol=1e-5, atol=1e-4)
    found = native_event_convolution.forward(x, weight, None if bias is None else bias.detach(), *PLAIN)
    assert torch.equal(got[0], found)  # type: ignore[arg-type]
    told = explain_convolutions()
    assert told.startswith("those of torch, but in float32 training and prepared networks read spikes alone (")
    with torch.no_grad():  # nothing is learned, and answers are those of torch to the bit
        assert torch.equal(run(x, weight), wanted[0])


@pytest.mark.parametrize("places", [(0, 0), (1, 5)])
def test_some_rows_do_not_stand_for_all(lists: list[bool], places: tuple[int, int]) -> None:
    """Images that are dark above, or bright."""
    x, _ = layer()
    x[:, :, places[0] : places[1]] = 1
    assert _share_of_events(x) == pytest.approx(float((x != 0).float().mean()), abs=0.05)


@pytest.mark.parametrize(("share", "answer"), [(0.0, None), (0.2, True), (0.7, False)])
def test_who_chooses_once_is_told_by_the_share(lists: list[bool], share: float, answer: bool | None) -> None:
    _, weight = layer()
    x = channels_last((torch.rand(2, weight.shape[1], 16, 16) < share).float())
    assert prefers_events(x, weight, *PLAIN) is answer
    assert prefers_events(x[:, 1:], weight, *PLAIN) is False  # no convolution
    assert prefers_events(x.bfloat16(), weight, *PLAIN) is False


def test_dense_inputs_are_those_of_torch_to_the_bit(lists: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = layer(spikes=False)
    wanted = gradients(lambda x, weight: torch.conv2d(x, weight, None, *PLAIN), x, weight)
    got = gradients(lambda x, weight: convolution(x, weight, None, *PLAIN), x, weight)
    assert lists == []  # some values told
    monkeypatch.setattr(module, "_share_of_events", lambda x: 0.1)  # and now they do not
    got = gradients(lambda x, weight: convolution(x, weight, None, *PLAIN), x, weight)
    assert lists == [False]
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_frozen_weights_and_gradients_of_the_bias(lists: list[bool]) -> None:
    x, weight = layer()
    bias = torch.zeros(64, requires_grad=True)
    convolution(x, weight, bias, *PLAIN).sum().backward()
    assert lists == []
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((64,), 40.0 * 30))


@needs_kernels
def test_operations_are_counted_as_ever() -> None:
    x, weight = layer()
    with FlopCounterMode(display=False) as counter:
        assert not fits(x, weight, None, (1, 1), 1)
        torch.conv2d(x, weight, None, *PLAIN)
    assert counter.get_total_flops() == 2 * 40 * 64 * 32 * 9 * 6 * 5
