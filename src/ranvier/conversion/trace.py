"""From a trained ANN, in whatever way it is written, to a graph of a few kinds of operations that computes the same."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from ranvier.checks import shape_of
from ranvier.conversion.fold_batchnorm import fold_batchnorm
from ranvier.conversion.max_pool import pool_before_activations
from ranvier.conversion.recording import ConversionError, record
from ranvier.conversion.translation import translate
from ranvier.conversion.vocabulary import is_site
from ranvier.conversion.without_time import spikes_already, without_time
from ranvier.kernels.full_float32 import full_float32
from ranvier.models import Network
from ranvier.nn import QCFS, Neuron

__all__ = ["ConversionError", "trace", "without_time"]

TOLERANCE = 1e-4
"""Largest difference between the graph and the ANN, over the largest output: float32 rounding, in many layers."""


@full_float32()
@torch.inference_mode(False)
@torch.no_grad()
def trace(ann: nn.Module, images: Tensor, *, move_max_pool: bool = True) -> fx.GraphModule:
    """Write down an ANN in the closed vocabulary of `ranvier.conversion.vocabulary`, and check that it is the same.

    Each use of an activation becomes a module of its own, a `Rectifier` or `QCFS`, and each use of a layer a layer of
    its own; batch normalisation is folded into the layer before it, and max-pooling moved in front of activations.
    Dropout and identities vanish. No operation mixes samples, and the graph runs for any number of them.

    The ANN runs on a few images and is watched meanwhile, so forward may be written in any way that calls functions of
    torch, does the same for all images and takes any number of them.

    Args:
        ann: Maps images `[B, ...]` to logits `[B, K]`; or a `Network` of `ranvier.models` with stateless activations.
            Not modified; evaluation mode is used, whatever its mode.
        images: Examples `[B, ...]`, floating, such as one batch of calibration images.
        move_max_pool: Whether max-pooling moves in front of activations: right where neurons will average over steps,
            not where activations stand for neurons that were trained as they are.

    Returns:
        The graph, without gradients, in evaluation mode. Modules are named as in the ANN: `layer1.0.relu` for a layer,
        or for a function by the module that calls it and its kind (`relu`, `conv`, `linear`, `norm`, `constant`), and
        `layer1.0.relu_1` for its second use. What a graph cannot call so has `node_` before its name, as `node_class`.

    Raises:
        ConversionError: The ANN cannot take the images, has no activation, spikes already, or computes something that
            spiking neurons cannot; the message names the module, the line and a remedy.
        TypeError: `images` is not a floating tensor.

    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    >>> [name for name, _ in trace(ann, torch.rand(3, 4)).named_children()]
    ['0', '2', '3']
    """
    _check_images(images)
    ann = getattr(ann, "_orig_mod", ann)  # what torch.compile wraps
    _check_modules(ann)
    model = _own_copy(without_time(ann) if isinstance(ann, Network) else ann)
    _check_logits(_output(model, images), images)
    graph = _normalised(model, images, move_max_pool)
    _check_same(graph, model, images)
    return graph


@torch.no_grad()
def size_that_is_needed(graph: fx.GraphModule, images: Tensor) -> tuple[int, int] | None:
    """Height and width that images must have, those of `images`, `[B, C, H, W]`; None where others pass, too.

    A network that flattens what its convolutions send knows no other size, and one that averages over places does.
    """
    if images.ndim != 4:
        return None
    height, width = images.shape[2:]
    try:
        graph(images.new_zeros(1, images.shape[1], 2 * height, 2 * width))
    except RuntimeError:
        return height, width
    return None


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        came = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise TypeError(f"images are {came}, but must be a floating torch.Tensor [B, ...]: bytes with images / 255.")
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"images have shape {shape_of(images)}, but must be at least one sample, [B, ...].")


def _check_modules(ann: nn.Module) -> None:
    """Raise for modules that conversion cannot look into, or that need none."""
    for path, module in ann.named_modules():
        if isinstance(module, Neuron):
            raise spikes_already(path, module)
        if isinstance(module, Network) and module is not ann:
            raise ConversionError(
                f"{path} (Network): a network of ranvier inside another module has a time axis, which an ANN has not. "
                "Convert the network itself, or put ranvier.conversion.without_time.without_time(network) in its place."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(
                f"{path or 'the ANN'} (ScriptModule): what torch.jit compiled cannot be looked into. "
                "Pass the module that it was made from."
            )


def _own_copy(ann: nn.Module) -> nn.Module:
    try:
        model = copy.deepcopy(ann)
    except Exception as error:
        raise ConversionError(
            f"{type(ann).__name__} cannot be copied: {error}. Remove what copy.deepcopy(ann) stumbles over, as "
            "old-style weight normalisation: torch.nn.utils.remove_weight_norm(layer)."
        ) from error
    return model.eval().requires_grad_(False)


def _output(model: nn.Module, images: Tensor) -> Any:
    try:
        return model(images.clone())  # which forward may change in place
    except Exception as error:
        raise ConversionError(
            f"the ANN cannot take calibration images of shape {shape_of(images)}: {error}. "
            "Prepare them as in training: size, channels, normalisation, device."
        ) from error


def _check_logits(output: Any, images: Tensor) -> None:
    if not isinstance(output, Tensor):
        raise ConversionError(
            f"the ANN returns a {type(output).__name__}, but conversion takes one that returns one tensor, logits "
            "[B, K]. Wrap it in a module whose forward returns ann(images) with only the logits picked."
        )
    if output.ndim != 2 or len(output) != len(images):
        raise ConversionError(
            f"the ANN returns shape {shape_of(output)} for images {shape_of(images)}, but conversion takes one that "
            "returns logits [B, K]. End it in a flatten and a linear layer."
        )
    if not output.isfinite().all():
        raise ConversionError(
            "the ANN returns values that are not finite. Check that its weights and running statistics are those of a "
            "trained network, and that images are prepared as in training."
        )


def _normalised(model: nn.Module, images: Tensor, move_max_pool: bool) -> fx.GraphModule:
    """The graph of a model, by running it on two batches of different size."""
    graph, other = (
        translate(record(model, images[torch.tensor(samples) % len(images)].clone())) for samples in ([0, 1], [2, 3, 4])
    )
    _check_same_for_any_batch(graph, other)
    if not any(is_site(node, graph) for node in graph.graph.nodes):
        raise ConversionError(
            f"{type(model).__name__} has no activation, so there is nothing that could spike. Conversion takes ANNs "
            "with nn.ReLU or ranvier.nn.QCFS."
        )
    if move_max_pool:
        pool_before_activations(graph)
    fold_batchnorm(graph)
    return graph


def _check_same_for_any_batch(graph: fx.GraphModule, other: fx.GraphModule) -> None:
    """Raise at the first node in which two graphs, recorded on batches of different size, differ."""
    for node, twin in zip_longest(graph.graph.nodes, other.graph.nodes):
        if node is None or twin is None or not _same_node(node, graph, twin, other):
            place = (node or twin).meta.get("place", type(graph).__name__)
            raise ConversionError(
                f"{place}: forward does something else on another batch of images. It must not depend on their number, "
                "on chance, or on values that left torch: use x.shape[0] for nothing but reshaping, pad with "
                "torch.nn.functional.pad instead of joining with new tensors, and draw no random numbers."
            )


def _same_node(node: fx.Node, graph: fx.GraphModule, twin: fx.Node, other: fx.GraphModule) -> bool:
    def written(node: fx.Node) -> tuple[Any, ...]:
        return node.op, node.target, *fx.map_arg((node.args, node.kwargs), lambda source: source.name)

    if written(node) != written(twin):
        return False
    settings, tensors = _constants(node, graph)
    other_settings, other_tensors = _constants(twin, other)
    return settings == other_settings and all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)


def _constants(node: fx.Node, graph: fx.GraphModule) -> tuple[str, dict[str, Tensor]]:
    """Settings and tensors of a node that is a module or a constant."""
    if node.op == "call_module":
        part = graph.get_submodule(str(node.target))
        return repr(part), part.state_dict()
    if node.op == "get_attr":
        return "", {"": graph.get_buffer(str(node.target))}
    return "", {}


def _check_same(graph: fx.GraphModule, model: nn.Module, images: Tensor) -> None:
    """Raise unless graph and model agree on `images`, to rounding.

    The steps of QCFS are smoothed away in both, since at a step rounding decides which way a value goes.
    """
    with _smooth(model), _smooth(graph):
        expected, again, output = (network(images.clone()) for network in (model, model, graph))
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    if (again - expected).abs().max() > TOLERANCE * largest:
        raise ConversionError(
            "the ANN returns something else when it runs on the same images again, in evaluation mode. Take the "
            "randomness, or the memory of earlier batches, out of its forward."
        )
    error = float((output - expected).abs().max() / largest)
    if not error <= TOLERANCE:
        raise ConversionError(
            f"the traced graph differs from the ANN by {error:.1e} of its largest output (rounding explains "
            f"{TOLERANCE:.0e}). If weights or running variances are extreme, convert it in float64: ann.double() and "
            "images.double(). Otherwise forward computes something that tracing missed: please report it."
        )


@contextmanager
def _smooth(model: nn.Module) -> Iterator[None]:
    """Leave out the rounding of QCFS activations, `y = clip(x, 0, ceiling)`."""
    modules = [module for module in model.modules() if isinstance(module, QCFS)]
    for module in modules:
        vars(module)["forward"] = partial(_clip, module)
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["forward"]


def _clip(module: QCFS, x: Tensor) -> Tensor:
    return x.clamp(min=0).minimum(module.ceiling)
