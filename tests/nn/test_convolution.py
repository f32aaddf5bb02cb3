"""Layers run as they would by themselves, whatever is faster."""

from typing import Any

import pytest
import torch
from torch import nn

from ranvier.kernels import native_convolution
from ranvier.nn import LIF, TimeFolded
from ranvier.nn.convolution import run_layer
from ranvier.nn.memory import PackedConv2d
from ranvier.nn.structure import Activation, Chain

needs_unit = pytest.mark.skipif(native_convolution.obstacle() is not None, reason=str(native_convolution.obstacle()))


def spikes() -> torch.Tensor:
    x = torch.randn(40, 32, 8, 7, generator=torch.Generator().manual_seed(0))
    return (x > 0.5).float().contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"stride": 2},
        {"padding": (0, 2)},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
        {"dilation": 2},
        {"groups": 4},
    ],
    ids=str,
)
def test_any_convolution_gives_what_it_gives_alone(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 64, 3, **options)
    got, wanted = run_layer(conv, spikes()), conv(spikes())
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(wanted)
    parameters = list(conv.parameters())
    found, expected = (torch.autograd.grad(y, parameters, upstream) for y in (got, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_settings_may_be_assigned_as_numbers() -> None:
    conv = nn.Conv2d(32, 64, 3)
    conv.stride = 2  # type: ignore[assignment]
    torch.testing.assert_close(run_layer(conv, spikes()), conv(spikes()))


@needs_unit
def test_hooks_see_a_convolution() -> None:
    conv, seen = nn.Conv2d(32, 64, 3, bias=False), []
    conv.register_forward_hook(lambda module, given, sent: seen.append(sent))
    y = TimeFolded(conv)(spikes().unsqueeze(0))
    assert len(seen) == 1
    assert torch.equal(seen[0], y[0])
    conv._forward_hooks.clear()
    assert not torch.equal(run_layer(conv, spikes()), seen[0]), "its sums are taken in another order"


def test_hooks_of_all_modules_and_another_forward() -> None:
    conv, seen = nn.Conv2d(32, 64, 3), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, sent: seen.append(sent))
    try:
        run_layer(conv, spikes())
    finally:
        handle.remove()
    assert len(seen) == 1
    conv.forward = lambda x: x  # type: ignore[method-assign]
    assert run_layer(conv, spikes()).shape == spikes().shape


def test_weights_that_are_made_by_a_parametrization() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(32, 64, 3))
    assert torch.equal(run_layer(conv, spikes()), conv(spikes()))


@needs_unit
@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_that_keeps_bits_gives_the_same_bits(bias: bool, casts: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(32, 64, 3, bias=bias)
    packed = nn.Conv2d(32, 64, 3, bias=bias)
    packed.load_state_dict(plain.state_dict())
    packed.__class__ = PackedConv2d
    packed.largest = 1  # type: ignore[assignment]
    results = []
    dtype = torch.bfloat16 if casts else torch.float32
    for conv in (plain, packed):
        x = spikes().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            y = run_layer(conv, x)
            with torch.no_grad():
                assert torch.equal(run_layer(conv, spikes().to(dtype)), y)
        assert y.dtype == dtype
        results.append((y, *torch.autograd.grad(y.float().square().sum(), [x, *conv.parameters()])))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@needs_unit
def test_a_network_is_compiled_whole_and_exported() -> None:
    torch.manual_seed(0)
    network = Chain(Activation(LIF(32)), TimeFolded(nn.Conv2d(32, 32, 3, padding=1, bias=False)), Activation(LIF(32)))
    network = network.to(memory_format=torch.channels_last)
    x = (2 * torch.rand(4, 8, 32, 8, 8)).movedim(2, -1).contiguous().movedim(-1, 2)
    wanted = network(x)
    assert 0 < wanted.mean() < 1
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)
    program = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(program(x), wanted)
    assert "ranvier.convolution" not in str(torch.export.export(network, (x,)).graph)
