"""Networks made ready to answer fast: normalisation folded, weights cast and laid out once, compiled where that pays.

What is measured, and how: `benchmarks/inference.py`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ranvier.checks import check_choice, check_logits, shape_of
from ranvier.conversion.fold_batchnorm import absorb, scale_and_shift
from ranvier.conversion.spiking import GraphSNN
from ranvier.conversion.vocabulary import LAYERS, ChannelAffine
from ranvier.data import evaluation_batch_size
from ranvier.evaluation.mode import device_of, evaluating
from ranvier.export.byte_graph import use_bytes_in_graph
from ranvier.export.byte_spikes import ByteConv2d, byte_kernels, use_bytes
from ranvier.export.convolved_chain import use_convolved_scans
from ranvier.export.convolved_graph import use_convolved_scans_in_graph
from ranvier.export.lean_neurons import make_lean
from ranvier.export.lean_residual import add_in_place
from ranvier.export.prepacked import Prepacked, packs
from ranvier.kernels import native_byte_convolution
from ranvier.kernels.dispatch import Choice, Implementation, choose, compile_whole
from ranvier.kernels.precision import choose_precision
from ranvier.models import Network, SpikingNetwork
from ranvier.nn import BatchNorm, Carry, Neuron, ProxyActivation, ProxyNorm, TimeFolded, fold_time, unfold_time
from ranvier.nn.converted import fixed_copy
from ranvier.nn.hooks import is_hooked
from ranvier.nn.memory import PackedConv2d
from ranvier.nn.structure import Chain

Precision = Literal["auto", "int8", "bfloat16", "float32"]
"""Of convolutions and linear layers."""

PRECISIONS = ("auto", "int8", "bfloat16", "float32")

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Of what comes in, and of layers that have no other precision."""

PACKED = (
    "convolutions with weights packed once, and one kernel for each neuron, on a matrix unit for both; compiled, every "
    "convolution would pack its weights anew at every call"
)
"""Why `auto` does not compile on a CPU."""


def to_inference(
    model: nn.Module, *, precision: Precision = "auto", implementation: Implementation = "auto"
) -> "InferenceNetwork":
    """A copy of a network that gives the same logits faster, and cannot be trained.

        scale (W x + b) + shift = (scale W) x + (scale b + shift)        scale, shift: BatchNorm in evaluation

    Every `BatchNorm` right behind a convolution or linear layer is absorbed by it. One that cannot be becomes a scale
    and shift of its own: behind the max-pooling of an `imagenet` stem; where it or its layer is used twice; behind a
    linear layer without `nn.Flatten`, whose outputs need not be the channels; behind a layer of another class, with
    hooks or with a parametrization, which stays as it is, in float32.

    `auto` is bfloat16 where the device has instructions for it, and float32 elsewhere.

    At `bfloat16` weights are cast here, and not in every call, and images in it. Potentials, states and what neurons
    have learned stay float32, and so does the layer that gives the logits: it costs next to nothing, and logits of
    bfloat16 would often tie.

    At `int8` convolutions that get spikes (of `IF`, `LIF`, `PLIF`, and converted neurons but signed ones) have weights
    of 8 bits, with a scale for each output channel, and spikes are bytes: see `ranvier.export.byte_spikes`. Everything
    else is as at `auto`. In files these weights take a quarter of what float32 takes. Nothing but weights, those of
    converted networks times thresholds, is rounded beyond that; measure what that costs:
    `agreement(model, fast, images)`.

    On a CPU, `auto` runs layer by layer: weights of convolutions are packed once for the instructions of the machine,
    which a compiled network does in every call. SEW-ResNet-18 at batch 1 takes half as long again when compiled. On a
    matrix unit (AMX) a convolution and the neurons behind it are one kernel, and currents stay float32: see
    `ranvier.export.convolved_chain`. With AVX2, convolutions in float32 whose input is mostly zero read spikes alone;
    which ones, the first images decide: let them be typical, and a call with all steps, before anything is streamed.
    Larger batches than `ranvier.data.evaluation_batch_size` pass in parts, which stay in the caches, unless a state
    comes or is wanted, or a hook watches. Elsewhere `auto` compiles.

    Args:
        model: A network of `ranvier.models`, or what `ranvier.conversion` made; compiled or not. Not changed. It must
            be where it is to run.
        precision: `auto`, `int8`, `bfloat16` or `float32`. At float32 logits are those of `model` up to rounding, which
            flips a spike where a potential is that close to its threshold. Of `ConvertedSNN`, whose spikes carry
            thresholds, bfloat16 rounds those too.
        implementation: `compiled` compiles the whole network as one graph, at the first call for each T. `reference`,
            `native` and `triton` run it layer by layer with that implementation of the neurons. `auto` chooses;
            `choice` of the result says what and why.

    Returns:
        A network that is called as `model` is, also to stream, and gives logits of float32.

    Raises:
        RuntimeError: The implementation that was asked for, or int8, cannot run here; the message says why.
        TypeError: `model` is no such network, or has parameters of layers that have no bfloat16 form here.
        ValueError: Unknown precision or implementation, or a network that is in analog mode; at int8, compiled, layers
            of a `Network` that are used twice, or no convolution that gets spikes.

    >>> from ranvier.models import mlp
    >>> fast = to_inference(mlp([16, 8, 3]), precision="float32")
    >>> logits, state = fast(torch.rand(5, 16), 1, return_state=True)
    >>> fast(torch.rand(5, 16), 1, state=state).shape
    torch.Size([1, 5, 3])
    """
    check_choice("precision", precision, PRECISIONS)
    with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode could not be used outside of it
        return _to_inference(_network_of(model), precision, implementation)


def _to_inference(network: SpikingNetwork, precision: Precision, implementation: Implementation) -> "InferenceNetwork":
    device = device_of(network)
    choice = _chosen(implementation, device)
    fast = choose_precision("auto" if precision == "int8" else precision, device).precision
    precision, dtype = "int8" if precision == "int8" else fast, DTYPES[fast]
    network = fixed_copy(network).eval().requires_grad_(False).float()
    for module in network.modules():
        if type(module) is PackedConv2d:  # it differs in what it keeps for backward, and there is none
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    _absorb_norms(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, Neuron):
            asked = implementation in ("reference", "native", "triton")
            module.implementation = implementation if asked else "auto"
            if choice.implementation != "compiled":
                make_lean(module, is_native=choice.implementation == "native")
        if dtype != torch.float32:
            _check_bfloat16(name, module)
    if precision == "int8":
        _use_bytes(network, choice, dtype)
    pack = choice.implementation != "compiled" and device.type == "cpu" and packs(dtype)
    _prepare_layers(network, dtype, pack=pack)
    if choice.implementation == "native":
        use_convolved_scans(network)
        if isinstance(network, GraphSNN):
            use_convolved_scans_in_graph(network)
    if choice.implementation != "compiled":
        add_in_place(network)
    return InferenceNetwork(network, precision, dtype, choice)


class InferenceNetwork(SpikingNetwork):
    """A network made by `to_inference`.

    Attributes:
        network: The copy that runs.
        precision: Of its convolutions and linear layers.
        dtype: Of what comes in, and of layers that have no other precision.
        choice: What runs it, and why.
    """

    def __init__(self, network: SpikingNetwork, precision: Precision, dtype: torch.dtype, choice: Choice) -> None:
        super().__init__(network.frame_dims, network.image_size)
        self.network = network
        self.precision = precision
        self.dtype = dtype
        self.choice = choice
        self._compiled: dict[int, Callable[..., Any]] = {}
        self.eval()

    @torch.no_grad()
    def run(self, x: Tensor, steps: int, carry: Carry | None) -> Tensor:
        """The network on images of its precision and layout; logits of float32."""
        count = 1 if carry is not None else self._parts_of(x, steps)
        if count == 1:
            return self._run(x, steps, carry)
        return torch.cat([self._run(part, steps, None) for part in x.tensor_split(count, dim=1)], dim=1)

    def _parts_of(self, x: Tensor, steps: int) -> int:
        """In how many parts a batch passes: in one where something watches that should see it whole."""
        if self.choice.implementation == "compiled" or x.device.type != "cpu" or torch.compiler.is_compiling():
            return 1
        fastest = evaluation_batch_size(steps, image_size=x.shape[3:])
        if x.shape[1] <= fastest or any(map(is_hooked, self.network.modules())):
            return 1
        return -(-x.shape[1] // fastest)

    def _run(self, x: Tensor, steps: int, carry: Carry | None) -> Tensor:
        x = x.to(self.dtype)
        if x.ndim == 5:
            x = unfold_time(fold_time(x).contiguous(memory_format=torch.channels_last), len(x))
        if self.choice.implementation != "compiled":
            return self.network.run(x, steps, carry).float()
        # One object for each T: the graph is unrolled over the steps, so that another T is another graph in any case.
        if steps not in self._compiled:
            self._compiled[steps] = compile_whole(self.network)
        compiled = self._compiled[steps]
        images = x[0] if len(x) == 1 else x
        if carry is None:
            return compiled(images, steps).float()
        logits, after = compiled(images, steps, state=carry.before, return_state=True)
        carry.after.extend(after)
        return logits.float()

    def __getstate__(self) -> dict[str, Any]:
        """Without what was compiled, which a copy makes again."""
        return {**vars(self), "_compiled": {}}

    def extra_repr(self) -> str:
        """Settings, as printed."""
        few = sum(isinstance(part, ByteConv2d) for part in self.modules())
        lists = sum(isinstance(part, Prepacked) and bool(part.reads_events) for part in self.modules())
        said = f"precision={self.precision}, {self.choice.implementation}" + f", {few} convolutions of int8" * (few > 0)
        return said + f", {lists} convolutions that read spikes alone" * (lists > 0)

    def train(self, mode: bool = True) -> "InferenceNetwork":
        """Stay in evaluation, whatever is asked: there is nothing to train."""
        return super().train(False)


@dataclass(frozen=True)
class Agreement:
    """How a network for inference compares with the one that it was made from.

    Attributes:
        predictions: Share of samples with the same answer after 1 .. T steps: the largest of the mean logits so far.
        difference: Largest difference of logits.
        largest: Largest logit, without its sign.
        samples: How many were compared.
    """

    predictions: tuple[float, ...]
    difference: float
    largest: float
    samples: int

    def __str__(self) -> str:
        shares = ", ".join(f"{100 * share:.4g} % at T={t}" for t, share in enumerate(self.predictions, 1))
        return (
            f"{self.samples} samples: same predictions {shares}; logits differ by {self.difference:.1e} at most "
            f"(largest {self.largest:.2g})"
        )


def agreement(model: nn.Module, fast: nn.Module, images: Tensor, steps: int | None = None) -> Agreement:
    """Compare a network for inference with the one that it was made from.

    Args:
        model: Called as `model(images, steps)`, returns logits `[T, B, K]`. Run in eval mode, and put back.
        fast: From `to_inference`, or another that is called alike.
        images: A constant input `[B, ...]`, or a sequence `[T, B, ...]`; at best images as the network is used on.
        steps: T; None for a sequence.

    Raises:
        ValueError: Images or steps that the networks do not take, no samples, or logits of different shapes.

    >>> from ranvier.models import mlp
    >>> model = mlp([16, 8, 3])
    >>> agreement(model, to_inference(model, precision="float32"), torch.zeros(4, 16), 2).predictions
    (1.0, 1.0)
    """
    with evaluating(model), evaluating(fast), torch.no_grad():
        expected, logits = model(images, steps), fast(images, steps)
    check_logits(expected)
    if logits.shape != expected.shape:
        raise ValueError(
            f"fast gives logits {shape_of(logits)}, but model {shape_of(expected)}. Compare a network with the one "
            "that was made from it: agreement(model, to_inference(model), images, steps)."
        )
    expected, logits = expected.double(), logits.double()
    same = expected.cumsum(0).argmax(-1) == logits.cumsum(0).argmax(-1)
    return Agreement(
        predictions=tuple(same.double().mean(1).tolist()),
        difference=float((logits - expected).abs().max()),
        largest=float(expected.abs().max()),
        samples=expected.shape[1],
    )


class _ScaleShift(nn.Module):
    """A normalisation in evaluation, on `[T, B, C, ...]`: `ChannelAffine` over time, in float32."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.affine = ChannelAffine(len(norm.weight))
        scale, shift = scale_and_shift(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        self.affine.scale.copy_(scale)
        self.affine.shift.copy_(shift)

    def forward(self, x: Tensor) -> Tensor:
        y = self.affine(fold_time(x)).to(x.dtype)
        return unfold_time(y, len(x))


class _Cast(nn.Module):
    """A layer that takes its input in the precision of its weights."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.to(self.layer.weight.dtype))
        return y


def _network_of(model: nn.Module) -> SpikingNetwork:
    """The network itself, if it is one that can be prepared."""
    network = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if isinstance(network, InferenceNetwork):
        raise TypeError("model is already made for inference. Pass the network that it was made from.")
    if not isinstance(network, SpikingNetwork):
        raise TypeError(
            f"model is a {type(network).__name__}, but inference knows networks of ranvier.models and "
            "ranvier.conversion. Of a wrapper (DataParallel, say) pass what it wraps, model.module; convert an ANN "
            "first: ranvier.conversion.convert(ann, images, steps=4)."
        )
    if any(isinstance(part, ProxyActivation | ProxyNorm) and part.analog for part in network.modules()):
        raise ValueError(
            "the network is in analog mode, in which it is an ANN. Call to_inference outside of `with analog(model):`."
        )
    return network


def _chosen(implementation: Implementation, device: torch.device) -> Choice:
    """What runs the network, and why; raises where it cannot run."""
    if implementation != "auto" or device.type != "cpu":
        return choose(implementation, device, values_per_step=2**31)
    try:
        choose("native", device, values_per_step=2**31)
    except RuntimeError as error:
        return Choice("reference", str(error))
    return Choice("native", PACKED)


def _use_bytes(network: SpikingNetwork, choice: Choice, dtype: torch.dtype) -> None:
    """Have spikes run as bytes, or raise where that cannot be, or gains nothing."""
    if choice.implementation == "compiled":
        raise ValueError(
            'precision="int8" runs layer by layer, but the implementation is "compiled". Pass implementation="auto" on '
            'a CPU; on other devices, where there is no such kernel, precision="auto".'
        )
    if not isinstance(network, Network | GraphSNN):
        raise TypeError(
            'precision="int8" is for networks of ranvier.models and ranvier.conversion, but this one is a '
            f'{type(network).__name__}. Pass precision="auto".'
        )
    if device_of(network).type == "cpu" and byte_kernels() is None:
        raise RuntimeError(
            'precision="int8" needs a CPU with AVX-512 and a torch with oneDNN, which has kernels for it there, or one '
            f'with AVX2 and ours: {native_byte_convolution.obstacle()} Pass precision="auto".'
        )
    count = use_bytes(network, dtype) if isinstance(network, Network) else use_bytes_in_graph(network, dtype)
    if count == 0:
        raise ValueError(
            'precision="int8" has no effect: in this network no convolution gets the spikes of IF, LIF, PLIF or '
            'converted neurons (but signed ones), or sums of them. Pass precision="auto".'
        )


@torch.no_grad()
def _absorb_norms(network: SpikingNetwork) -> None:
    """Let layers absorb the normalisation behind them; what is left becomes a scale and shift."""
    uses = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    for chain in list(network.modules()):
        parts: Any = chain.layers if type(chain) is Chain else chain
        if type(chain) not in (Chain, nn.Sequential):
            continue
        index = 1
        while index < len(parts):
            layer, norm = _ending(parts[index - 1]), parts[index]
            if layer is None or type(norm) not in (BatchNorm, ProxyNorm) or uses[id(layer)] + uses[id(norm)] != 2:
                index += 1
                continue
            absorb(layer, *scale_and_shift(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps))
            del parts[index]
    left: dict[nn.Module, _ScaleShift] = {}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if type(module) in (BatchNorm, ProxyNorm):
            assert isinstance(module, BatchNorm)
            if module not in left:
                left[module] = _ScaleShift(module)
            network.set_submodule(name, left[module])


def _ending(part: nn.Module) -> nn.Conv1d | nn.Conv2d | nn.Linear | None:
    """The layer whose output channels are those of `part`, None where there is no such layer."""
    if type(part) is not TimeFolded or len(part) == 0:
        return None
    *before, layer = part
    if not isinstance(layer, LAYERS) or not _plain(layer):
        return None
    # The outputs of a linear layer are the last axis; it is that of the channels if there is no other.
    flat = any(isinstance(other, nn.Flatten) and (other.start_dim, other.end_dim) == (1, -1) for other in before)
    return layer if flat or not isinstance(layer, nn.Linear) else None


def _plain(layer: nn.Module) -> bool:
    """Whether a layer does what its weights say, and nothing else, such as computing them first."""
    return type(layer) in LAYERS and not is_hooked(layer)


def _check_bfloat16(name: str, module: nn.Module) -> None:
    """Raise if a module has parameters and would meet inputs of bfloat16 with them."""
    known = (*LAYERS, parametrize.ParametrizationList, Neuron, BatchNorm, _BatchNorm, ChannelAffine)
    if isinstance(module, known) or not any(True for _ in module.parameters(recurse=False)):
        return
    raise TypeError(
        f"{name or 'the network'} is a {type(module).__name__} with parameters of its own, but at bfloat16 only "
        "convolutions, linear layers, normalisations and neurons are known. "
        'Pass precision="float32", or run the network under torch.autocast.'
    )


def _prepare_layers(network: SpikingNetwork, dtype: torch.dtype, *, pack: bool) -> None:
    """Cast and lay out the weights, in place, and put each layer behind what its input needs."""
    last = _last_layers(network)
    prepared: dict[nn.Module, nn.Module] = {}
    for name, layer in list(network.named_modules(remove_duplicate=False)):
        if not isinstance(layer, LAYERS):
            continue
        if layer not in prepared:
            if _plain(layer) and layer not in last:
                layer.to(dtype)
            if isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            prepared[layer] = _prepared(layer, dtype, pack=pack)
        network.set_submodule(name, prepared[layer])


def _prepared(layer: nn.Conv1d | nn.Conv2d | nn.Linear, dtype: torch.dtype, *, pack: bool) -> nn.Module:
    if not pack or not isinstance(layer, nn.Conv2d) or not _plain(layer):
        return layer if dtype == torch.float32 else _Cast(layer)
    padded_by_kernel = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return Prepacked(layer) if padded_by_kernel else _Cast(layer)


def _last_layers(network: SpikingNetwork) -> set[nn.Module]:
    """The layers that give the logits; none where that is not known."""
    if isinstance(network, Network):
        return {layer for layer in network.readout.modules() if isinstance(layer, LAYERS)}
    if not isinstance(network, GraphSNN):
        return set()
    graph = network.network
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    sources = [graph.get_submodule(str(node.target)) for node in output.all_input_nodes if node.op == "call_module"]
    return {layer for layer in sources if isinstance(layer, LAYERS)}
