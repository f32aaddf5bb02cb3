"""Networks that normalise and fire in one operator: what they compute, what they keep, and when they do not."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranvier.kernels import native_scan
from ranvier.nn import IF, LIF, LIFB, PLIF, BatchNorm, structure
from ranvier.nn.normalized import normalized
from ranvier.nn.structure import Activation, Chain, Residual, conv_norm

pytestmark = pytest.mark.skipif(native_scan.obstacle() is not None, reason=str(native_scan.obstacle()))


def images(steps: int = 4) -> Tensor:
    x = torch.randn(steps * 8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=torch.channels_last).unflatten(0, (steps, 8))


def chain(neuron: Any = LIF, **settings: Any) -> Chain:
    torch.manual_seed(0)
    return Chain(conv_norm(3, 16, **settings), Activation(neuron(16))).to(memory_format=torch.channels_last)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each normalisation before an activation became one operator with it."""
    found: list[bool] = []

    def watched(norm: BatchNorm, neuron: nn.Module, x: Tensor, added: Tensor | None = None) -> Tensor | None:
        spikes = normalized(norm, neuron, x, added)
        found.append(spikes is not None)
        return spikes

    monkeypatch.setattr(structure, "normalized", watched)
    return found


@pytest.mark.parametrize("statistics", ["folded", "per_step"])
@pytest.mark.parametrize("neuron", [IF, LIF, PLIF, LIFB])
def test_agrees_with_the_layers(neuron: Any, statistics: str, used: list[bool]) -> None:
    ours = chain(neuron, statistics=statistics)
    theirs = copy.deepcopy(ours)
    norm, layer = theirs.layers[0][1], theirs.layers[1]
    spikes = ours(images())
    expected = layer(norm(theirs.layers[0][0](images())))
    assert used == [True]
    assert torch.equal(spikes, expected)
    assert 0.02 < spikes.mean() < 0.9
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    upstream = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(1))
    for network, out in ((ours, spikes), (theirs, expected)):
        assert network is not None
        out.backward(upstream)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).norm() < 1e-4 * other.grad.norm()


def residual(neuron: Any = LIF, channels: int = 16) -> Residual:
    torch.manual_seed(1)
    branch = Chain(conv_norm(3, channels), Activation(neuron(channels)))
    shortcut = Chain(conv_norm(3, channels, kernel_size=1), Activation(neuron(channels)))
    return Residual(branch, shortcut).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("case", "compiled"),
    [
        *itertools.product(("one operator", "autocast", "channels", "evaluation"), (False, True)),
        *itertools.product(("branch hook", "neuron hook"), (False,)),
    ],
)
def test_spikes_and_shortcut_are_added(case: str, compiled: bool, used: list[bool]) -> None:
    """The same sum wherever it is written; a hook sees what it would, the spikes alone."""
    ours = residual(channels=12 if case == "channels" else 16)
    if case == "evaluation":
        ours.eval()
    theirs = copy.deepcopy(ours)
    seen: list[Tensor] = []
    hooked = {"branch hook": ours.branch, "neuron hook": ours.branch.layers[1]}.get(case)  # type: ignore[index, union-attr]
    if hooked is not None:
        hooked.register_forward_hook(lambda _, __, y: seen.append(y.detach()))
    assert ours.branch.can_add == (case in ("one operator", "autocast", "channels"))
    run = torch.compile(ours) if compiled else ours
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        found = run(images())
        first, second = theirs.branch(images()), theirs.shortcut(images())
        expected = first + second
    assert torch.equal(found, expected)
    assert any(used) == (case not in ("channels", "evaluation"))
    if hooked is not None:
        assert torch.equal(seen[0], first)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    found.backward(upstream.to(found.dtype))
    expected.backward(upstream.to(found.dtype))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).norm() < (0.01 if case == "autocast" else 1e-4) * other.grad.norm()


def test_a_shortcut_that_is_not_like_the_spikes_is_added_afterwards(used: list[bool]) -> None:
    net = chain()
    spikes, wide = net(images()), torch.rand(4, 8, 16, 1, 1, dtype=torch.float64)
    for added in (wide, wide.float(), wide.bfloat16().expand_as(spikes)):
        total = net(images(), added=added)
        assert total.dtype == torch.result_type(spikes, added)
        assert torch.equal(total, spikes + added)
    assert used == [True, False, False, False]


@pytest.mark.parametrize("statistics", ["folded", "per_step"])
def test_running_averages_are_not_rounded_under_autocast(statistics: str, used: list[bool]) -> None:
    ours = chain(statistics=statistics)
    theirs = copy.deepcopy(ours)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(5):
            ours(images())
            theirs.layers[0](images())
    assert used == [True] * 5
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_keeps_the_input_alone(used: list[bool]) -> None:
    """What is as large as the input: of the convolution its input, of the operator its own, and nothing between."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() == 4 * 8 * 16 * 8 * 8:
            sizes.append(tensor.data_ptr())
        return tensor

    for expected, apart in ((1, False), (2, True)):
        sizes.clear()
        net = chain()
        if apart:
            net.layers[0][1].register_forward_hook(lambda *_: None)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net(images())
        assert len(set(sizes)) == expected
    assert used == [True]


@pytest.mark.parametrize("case", ["evaluation", "state", "hook", "norm hook", "frozen", "channels", "another neuron"])
def test_takes_the_layers_elsewhere(case: str, used: list[bool]) -> None:
    seen: list[nn.Module] = []
    net = chain()
    if case == "channels":
        net = Chain(conv_norm(3, 12), Activation(LIF(12)))
    if case == "another neuron":
        net = Chain(conv_norm(3, 16), Activation(nn.ReLU()))
    if case == "hook":
        net.layers[1].neuron.register_forward_hook(lambda module, *_: seen.append(module))
    if case == "norm hook":
        net.layers[0][1].register_forward_hook(lambda module, *_: seen.append(module))
    if case == "frozen":
        net.layers[0][1].eval()
    if case == "evaluation":
        net.eval()
    if case == "state":
        from ranvier.nn import Carry

        carry = Carry(None)
        net(images(), carry)
        assert len(carry.finish()) == 1
    else:
        net(images())
    assert not any(used)
    assert len(seen) == ("hook" in case)


@pytest.mark.parametrize(("statistics", "steps"), [("folded", 1), ("per_step", 4)])
def test_one_value_per_channel_is_refused(statistics: Any, steps: int) -> None:
    net = Chain(nn.Sequential(BatchNorm(2048, statistics=statistics)), Activation(LIF(2048)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.randn(steps, 1, 2048))


@pytest.mark.parametrize("statistics", ["folded", "per_step"])
def test_compiled_networks_use_it_too(statistics: str, used: list[bool]) -> None:
    eager, given = chain(statistics=statistics), images()
    compiled = copy.deepcopy(eager)
    first, second = eager(given), torch.compile(compiled, fullgraph=True)(given)
    assert torch.equal(first, second)
    first.square().sum().backward()
    second.square().sum().backward()
    for one, other in zip(eager.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert used[0]
