"""From a spiking network to its graph of layers, neurons and sums, with normalisation folded."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ranvier.checks import shape_of
from ranvier.conversion.one_step import one_step
from ranvier.conversion.recording import ConversionError
from ranvier.conversion.spiking import GraphSNN, spiking
from ranvier.conversion.trace import trace
from ranvier.conversion.vocabulary import is_site
from ranvier.conversion.without_time import without_time
from ranvier.models import Network
from ranvier.models.network import SpikingNetwork
from ranvier.nn import ConvertedIF, Neuron
from ranvier.nn.converted import fixed_copy

IMAGE_SIZE = 32
"""Height and width of the example for networks that take images of any size."""

STEPS = 4
"""T where neither a network nor its images tell."""

HALF = (torch.float16, torch.bfloat16)


class TracedNetwork(NamedTuple):
    """One step of a spiking network: a graph on `[B, ...]` in which a `Rectifier` stands for each neuron."""

    graph: fx.GraphModule
    neurons: dict[str, Neuron]
    """Copies of the neurons, by the name of their `Rectifier`, in the order in which they run."""
    frame_dims: tuple[int, ...]
    image_size: int | tuple[int, int] | None = None
    """Height and width that images must have, or None where it takes any."""
    readout_decay: float = 1.0
    """Of what is made of its logits, see `GraphSNN`."""

    def to_snn(self) -> GraphSNN:
        """The graph over time."""
        graph = spiking(self.graph, self.neurons)
        return GraphSNN(graph, self.frame_dims, self.image_size, readout_decay=self.readout_decay)


def trace_network(network: nn.Module, images: Tensor | None = None) -> TracedNetwork:
    """Write down a spiking network in the vocabulary of `ranvier.conversion.vocabulary`, as one step of it.

    Batch normalisation is folded into the layers before it. That rounds differently, so that a current within rounding
    of a threshold may fall on its other side: in float64 (`network.double()`) practically none does. A network in half
    precision is traced in float32, in which normalisation can be folded.

    Args:
        network: A `Network` of `ranvier.models`, or what `convert` or `decouple` made. Not modified; evaluation mode
            is used, whatever its mode.
        images: Examples `[B, ...]`, for their shape; None makes some up: of the size that the network was built for,
            or 32 x 32 where it takes any. Needed for what was converted or decoupled.

    Raises:
        ConversionError: The network has no neuron, or a part that is no layer, neuron or sum, such as self-attention.
        TypeError: `network` is not a `Network`.
        ValueError: `images` are not such as the network takes, or are needed and missing.
    """
    network = getattr(network, "_orig_mod", network)  # what torch.compile wraps
    if not isinstance(network, Network | GraphSNN):
        raise TypeError(
            f"network is a {type(network).__name__}, but must be a Network of ranvier.models. Build it from encoder, "
            "body and readout, as ranvier.models.mlp does."
        )
    network = fixed_copy(network).eval()
    if any(tensor.dtype in HALF for tensor in network.state_dict().values()):
        network = network.float()
    images = None if images is None else widened(images)
    if isinstance(network, GraphSNN):
        if images is None:
            raise ValueError(
                "the network is a graph, which does not know the size of its images. Pass a batch of them."
            )
        _check_fit(network, images, made_up=False)
        parts = one_step(network, images)
        return TracedNetwork(*parts, network.frame_dims, network.image_size, network.readout_decay)
    neurons: dict[str, Neuron] = {}
    step = without_time(network, neurons)
    if not neurons:
        raise ConversionError(
            f"{type(network).__name__} has no neuron of ranvier.nn: it is an ANN. Convert it first: "
            "ranvier.conversion.convert."
        )
    made_up = images is None
    images = example_images(network) if images is None else images
    _check_fit(network, images, made_up)
    if images.ndim == 2 and 4 in network.frame_dims:
        images = images[:, :, None, None]  # so that the graph flattens images, too
    graph = trace(step, images, move_max_pool=False)
    found: dict[str, Neuron] = {}
    for node in graph.graph.nodes:
        if is_site(node, graph):
            path = node.meta["place"].path
            if path not in neurons:
                raise ConversionError(
                    f"{node.meta['place']}: no neuron, but an activation of an ANN. Put a neuron there."
                )
            found[str(node.target)] = copy.deepcopy(neurons[path]).eval().requires_grad_(False)
    return TracedNetwork(graph, found, network.frame_dims, network.image_size)


def widened(images: Tensor) -> Tensor:
    """Images in at least float32, as a network in half precision is traced."""
    return images.float() if isinstance(images, Tensor) and images.dtype in HALF else images


def usual_steps(network: nn.Module) -> int:
    """T that a network was converted for, as far as it tells, else 4."""
    rows = [len(each.bias) for each in network.modules() if isinstance(each, ConvertedIF) and len(each.bias) > 1]
    return int(getattr(network, "steps", min(rows, default=STEPS)))


@torch.no_grad()
def _check_fit(network: SpikingNetwork, images: Tensor, made_up: bool) -> None:
    """Raise if the network does not take these images."""
    try:
        network(images, 1)
    except (ValueError, RuntimeError) as error:
        which = "images that were made up for it" if made_up else "the images"
        raise ValueError(
            f"the network cannot take {which}, of shape {shape_of(images)}: {error}. Pass a batch of its images, "
            "[B, ...]."
        ) from error


def example_images(network: Network, count: int = 2) -> Tensor:
    """Random images `[B, ...]` that a network takes: for their shape, to trace or count with.

    Raises:
        ValueError: No layer with weights before the first neuron, which could tell the shape.

    >>> from ranvier.models import mlp
    >>> example_images(mlp([64, 32, 10])).shape
    torch.Size([2, 64, 1, 1])
    """
    first = next((layer for layer in network.encoder.modules() if isinstance(layer, nn.Conv2d | nn.Linear)), None)
    shape: tuple[int, ...]
    if first is None:
        raise ValueError(
            "the network has neither convolution nor linear layer before its first neuron, so that nothing tells what "
            "images look like. Pass a batch of them."
        )
    if isinstance(first, nn.Linear):
        shape = (first.in_features, *(1,) * (max(network.frame_dims) - 2))  # flattened, whatever the sizes
    else:
        side = network.image_size or IMAGE_SIZE
        shape = (first.in_channels, side, side)
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay what they would have been
    return torch.rand(count, *shape, generator=generator, dtype=first.weight.dtype).to(first.weight.device)
