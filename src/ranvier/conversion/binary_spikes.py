"""Networks whose neurons send nothing but 0 and 1, as hardware does: what spikes are worth moves into the weights."""

from ranvier.conversion.trace_network import TracedNetwork
from ranvier.conversion.weighted_spikes import Emission, weigh_spikes
from ranvier.nn import LIFB, ConvertedIF, LIFPair, Neuron


def binary_spikes(traced: TracedNetwork, *, free_running: bool = False) -> TracedNetwork:
    """The same network with binary spikes (of signed neurons: -1, 0 and 1).

    A burst neuron becomes a pair of LIF neurons, worth 1 and strength - 1; a converted neuron sends 1 where it sent its
    threshold. The layers after them get the factors, and a copy for each of a pair.

    Args:
        traced: From `trace_network`. Not modified.
        free_running: Whether the second neuron of a pair resets at its own spikes alone, which is another network.

    Raises:
        ConversionError: Max-pooling where it does not commute with this.
    """
    emissions: dict[str, Emission] = {}
    neurons = dict(traced.neurons)
    for name, neuron in traced.neurons.items():
        if isinstance(neuron, LIFB):
            emissions[name] = (None, neuron.strength - 1)
            neurons[name] = _pair(neuron, coupled=not free_running)
        elif isinstance(neuron, ConvertedIF) and not neuron.binary:
            emissions[name] = (neuron.threshold,)
            neurons[name] = neuron.fixed(binary=True)
    return traced._replace(graph=weigh_spikes(traced.graph, emissions), neurons=neurons)


def _pair(neuron: LIFB, coupled: bool) -> Neuron:
    own = neuron.params
    return LIFPair(
        tau=own.tau,
        v_threshold=own.v_threshold,
        reset=own.reset,
        coupled=coupled,
        detach_reset=own.detach_reset,
        surrogate=own.surrogate,
        implementation=neuron.implementation,
    )
