"""From recorded calls to a graph of the vocabulary."""

import inspect
from typing import Any

from torch import fx

from ranvier.conversion.draft import Draft, Handler, mixes_samples, with_sizes
from ranvier.conversion.recording import Call, Recording, Value
from ranvier.conversion.translate_arithmetic import ARITHMETIC_HANDLERS
from ranvier.conversion.translate_layers import LAYER_HANDLERS
from ranvier.conversion.translate_shapes import SHAPE_HANDLERS

HANDLERS: dict[str, Handler] = LAYER_HANDLERS | ARITHMETIC_HANDLERS | SHAPE_HANDLERS
"""By name of the torch function, method or attribute; an in-place form has the name without the underscore."""

OTHERWISE = (
    "Convertible are ReLU, ReLU6, clamp from 0, QCFS; 1-d and 2-d convolutions and linear layers; batch normalisation; "
    "average and max-pooling; sums, constant factors, concatenation, slices, reshaping."
)
_RECTIFY = "Use nn.ReLU or ranvier.nn.QCFS in its place and train again: a firing rate cannot follow other functions."
_NORMALISE = "Use batch normalisation in its place and train again: with running statistics it is linear."
_ATTENTION = "It multiplies values that both depend on the images: use a network without attention."
_LOGITS = "Return logits: softmax belongs into the loss, and the class is the same without it."
_GLOBAL = "For global max-pooling use nn.AdaptiveMaxPool2d(1)."
_PICK = "It picks by index, which is not linear: networks that start from images can be converted."
_EINSUM = "Write it as nn.Linear or as a convolution."
_RECURRENT = "Its gates multiply values that both depend on the images: use convolutions."
_CHANCE = "Draw no random numbers in evaluation."
_CONSTANTS = "To add zeros, for example to channels, use torch.nn.functional.pad."


def _about(*names: str, remedy: str) -> dict[str, str]:
    return dict.fromkeys(names, remedy)


REMEDIES: dict[str, str] = {
    **_about("gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "prelu", "rrelu", "glu", remedy=_RECTIFY),
    **_about("sigmoid", "logsigmoid", "tanh", "softplus", "softsign", "hardswish", "hardsigmoid", remedy=_RECTIFY),
    **_about("threshold", "softshrink", "hardshrink", "tanhshrink", "maximum", "floor", "round", remedy=_RECTIFY),
    **_about("layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm", remedy=_NORMALISE),
    **_about("scaled_dot_product_attention", "multi_head_attention_forward", "bmm", "baddbmm", remedy=_ATTENTION),
    **_about("softmax", "log_softmax", remedy=_LOGITS),
    **_about("lstm", "gru", "rnn_tanh", "rnn_relu", remedy=_RECURRENT),
    **_about("rand_like", "randn_like", "randint_like", "bernoulli", "normal", "uniform", remedy=_CHANCE),
    **_about("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", remedy=_CONSTANTS),
    **_about("max", "amax", remedy=_GLOBAL),
    **_about("embedding", "embedding_bag", remedy=_PICK),
    **_about("einsum", remedy=_EINSUM),
}
"""What to do about functions without a handler; `OTHERWISE` where nothing more helpful is known."""

_TORCH_NAMES = {"axis": "dim", "axes": "dim", "keepdims": "keepdim"}
"""Torch's own names of arguments that it also takes under numpy's."""


def translate(recording: Recording) -> fx.GraphModule:
    """The recorded network in the vocabulary.

    Raises:
        ConversionError: A call that has no translation, that mixes samples or changes the data type.
    """
    draft = Draft()
    nodes = {recording.images: with_sizes(draft.graph.placeholder("images"), recording.images.shape[1:])}
    for call in recording.calls:
        for value, node in zip(call.results, _translated(draft, call, nodes), strict=True):
            nodes[value] = with_sizes(node, value.shape[1:])
    draft.graph.output(nodes[recording.output])
    module = fx.GraphModule(draft.parts, draft.graph).eval()
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _translated(draft: Draft, call: Call, nodes: dict[Value, fx.Node]) -> list[fx.Node]:
    handler = HANDLERS.get(call.name)
    if handler is None:
        raise call.refuse("has no counterpart in a spiking network", REMEDIES.get(call.name, OTHERWISE))
    if any(value.shape[:1] != (call.num_samples,) for value in call.results):
        raise mixes_samples(call)
    for value in call.results:
        if value.dtype != call.dtype:
            raise call.refuse(f"turns {call.dtype} into {value.dtype}", f"Keep to {call.dtype} from input to output.")
    draft.call = call
    args = _with_nodes(call.args, nodes)
    kwargs = {_TORCH_NAMES.get(name, name): _with_nodes(value, nodes) for name, value in call.kwargs.items()}
    try:
        inspect.signature(handler).bind(draft, *args, **kwargs)
    except TypeError as error:
        raise call.refuse(f"is called in a way that cannot be translated ({error})", OTHERWISE) from error
    results = handler(draft, *args, **kwargs)
    return results if isinstance(results, list) else [results]


def _with_nodes(argument: Any, nodes: dict[Value, fx.Node]) -> Any:
    if isinstance(argument, Value):
        return nodes[argument]
    if type(argument) in (tuple, list):
        return type(argument)(_with_nodes(item, nodes) for item in argument)
    return argument
