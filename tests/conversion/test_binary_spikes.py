"""Neurons that send 0 and 1: what a spike is worth moves into the layer behind it, and nothing else changes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranvier.conversion.binary_spikes import binary_spikes
from ranvier.conversion.spiking import GraphSNN
from ranvier.conversion.trace_network import TracedNetwork, trace_network
from ranvier.models import mlp
from ranvier.nn import LIF, LIFB, ConvertedIF, LIFPair

from .dyadic import Residual, exact, images, twins


def bursting() -> tuple[nn.Module, Tensor]:
    """Bursts of 3/2, whose halves are exact."""
    network = exact(mlp([4, 6, 5, 3], neuron=lambda channels: LIFB(channels, burst_init=1.5)))
    for neuron in network.modules():
        if isinstance(neuron, LIFB):
            nn.init.constant_(neuron.strength, 1.5)
    return network, 4 * images(50, 4)


def sent(snn: GraphSNN, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits of four steps, and what every neuron sent."""
    spikes: list[Tensor] = []

    def keep(_: nn.Module, given: Any, output: Any) -> None:
        spikes.append(output[0] if isinstance(output, tuple) else output)

    handles = [
        each.register_forward_hook(keep) for each in snn.modules() if isinstance(each, ConvertedIF | LIFPair | LIF)
    ]
    logits = snn(x, 4)
    for handle in handles:
        handle.remove()
    return logits, spikes


@torch.no_grad()
@pytest.mark.parametrize("signed", [False, True])
def test_converted_neurons_send_ones(signed: bool) -> None:
    x = images(20, 2, 6, 6)
    _, snn = twins(exact(Residual()), x, signed=signed)
    traced = trace_network(snn, x)
    logits, spikes = sent(binary_spikes(traced).to_snn(), x)
    assert torch.equal(logits, snn(x, 4))
    assert set(torch.cat([each.flatten() for each in spikes]).unique().tolist()) <= (
        {-1.0, 0.0, 1.0} if signed else {0.0, 1.0}
    )
    assert not any(neuron.binary for neuron in traced.neurons.values() if isinstance(neuron, ConvertedIF))  # unchanged


@torch.no_grad()
def test_bursts_become_pairs_that_send_ones() -> None:
    network, x = bursting()
    traced = trace_network(network)
    made = binary_spikes(traced)
    assert all(isinstance(neuron, LIFPair) for neuron in made.neurons.values())
    logits, spikes = sent(made.to_snn(), x)
    assert torch.equal(logits, network(x, 4))
    for each in spikes:
        first, second = each.chunk(2, 2)
        assert set(each.unique().tolist()) == {0.0, 1.0}
        assert bool((second <= first).all())  # of twice the threshold


@torch.no_grad()
def test_pairs_that_run_free_are_another_network() -> None:
    network, x = bursting()
    made = binary_spikes(trace_network(network), free_running=True)
    assert not torch.equal(made.to_snn()(x, 4), network(x, 4))


def test_what_sends_ones_already_stays() -> None:
    traced: TracedNetwork = trace_network(mlp([4, 6, 3], neuron=LIF))
    made = binary_spikes(traced)
    assert made.neurons == traced.neurons
    assert [(node.op, node.target) for node in made.graph.graph.nodes] == [
        (node.op, node.target) for node in traced.graph.graph.nodes
    ]
