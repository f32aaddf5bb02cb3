"""What is computed again in backward is what was computed before."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from ranvier import models
from ranvier.nn import LIF, LIFB, PLIF, BatchNorm, TimeFolded, recompute_norms
from ranvier.nn.recompute import recomputed
from ranvier.nn.structure import Activation, Chain


def kept_bytes(run: Callable[[], Tensor], network: nn.Module) -> int:
    """Bytes that a forward pass keeps for backward besides the weights, each storage once."""
    seen: dict[int, int] = {}
    weights = {weight.data_ptr() for weight in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = run()
    del kept
    return sum(size for place, size in seen.items() if place not in weights)


@pytest.mark.parametrize("statistics", ["folded", "per_step"])
@pytest.mark.parametrize("neuron", [LIF, PLIF, LIFB])
def test_a_normalisation_and_its_neuron(neuron: Callable[[int], nn.Module], statistics: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 2, 2)
    results = []
    for again in (False, True):
        torch.manual_seed(1)
        norm, activation = BatchNorm(5, statistics=statistics), neuron(5)  # type: ignore[arg-type]
        current = x.clone().requires_grad_()
        spikes = recomputed(norm, activation, current) if again else activation(norm(current))
        parameters = [current, *norm.parameters(), *activation.parameters()]
        gradients = torch.autograd.grad((spikes * x).sum(), parameters)
        assert norm.momentum == 0.1
        results.append([spikes, *gradients, norm.running_mean, norm.running_var])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("build", [partial(models.vgg, (4, "A", 6, 6), image_size=8), models.sew_resnet18])
def test_networks(build: Callable[..., nn.Module], autocast: bool) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results, kept = [], []
    for again in (False, True):
        torch.manual_seed(1)
        network = build(num_classes=10, in_channels=3)
        assert not again or recompute_norms(network)

        def run(network: nn.Module = network) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits: Tensor = network(x, 3)
            return logits

        logits = run()
        logits.float().square().sum().backward()
        results.append([logits, *(weight.grad for weight in network.parameters()), *network.buffers()])
        kept.append(kept_bytes(run, network))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert autocast or kept[1] < 0.85 * kept[0]  # autocast keeps cast weights besides


def test_streaming_evaluation_and_compiled_networks_stay_as_they_were() -> None:
    torch.manual_seed(0)
    network = models.vgg((4, 6, 6), num_classes=10, in_channels=3, image_size=8).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = network(x, 3)
    recompute_norms(network)
    logits, _ = network(x, 3, return_state=True)
    assert torch.equal(logits, expected)
    assert torch.equal(network(x, 3), expected)
    assert torch.equal(torch.compile(network, fullgraph=True, backend="aot_eager")(x, 3), expected)


def test_backward_twice_and_modes_that_change_in_between() -> None:
    torch.manual_seed(0)
    network = models.vgg((4, 6), num_classes=3, in_channels=2, image_size=8)
    x = torch.randn(2, 2, 8, 8)
    wanted = torch.autograd.grad(network(x, 2).sum(), list(network.parameters()))
    recompute_norms(network)
    loss = network(x, 2).sum()
    network.eval()
    for _ in range(2):
        got = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        for ours, theirs in zip(got, wanted, strict=True):
            assert torch.equal(ours, theirs)


def test_what_is_there_twice_runs_twice_and_random_activations_are_left_alone() -> None:
    torch.manual_seed(0)
    conv = TimeFolded(nn.Conv2d(3, 3, 3, padding=1))
    chain = Chain(nn.Sequential(conv, conv, BatchNorm(3)), Activation(LIF(3)), BatchNorm(3), Activation(nn.RReLU()))
    x = torch.randn(2, 2, 3, 5, 5)
    results = []
    for again in (False, True):
        chain.recompute = again
        torch.manual_seed(1)
        sent = chain(x)
        results.append([sent, *torch.autograd.grad(sent.sum(), list(chain.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
