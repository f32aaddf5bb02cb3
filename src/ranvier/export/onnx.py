"""Networks as ONNX files, for ONNX Runtime and whatever else reads them."""

import importlib.util
import json
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranvier import provenance
from ranvier.atomic import replacing
from ranvier.export.program import (
    Capture,
    capture_network,
    check_ending,
    confirmed,
    prepare,
    without_exporter_noise,
)
from ranvier.export.receipt import BATCH, ExportError, Port, Receipt, Runner

LARGEST = 2**31 - 1
"""Bytes of an ONNX file with its weights inside: protobuf's limit."""


def to_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    images: Tensor,
    steps: int,
    streaming: bool = False,
    dynamic_batch: bool = True,
    opset: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Receipt:
    """Write a network as one ONNX file of standard operators, weights inside.

        all steps   images [B, ...]                           -> logits [T, B, K]
        streaming   images [B, ...], state_0, state_1, ...    -> logits [B, K], next_state_0, next_state_1, ...

    The network is exported as it runs in evaluation mode, whatever mode it is in, from a copy on the CPU. A state is
    zeros before the first step, whatever it means; the receipt says what each one is. `metadata_props` of the file have
    versions, T and layout, under names that begin with `ranvier.`.

    Args:
        model: A network of `ranvier.models`, or what `ranvier.conversion` made; compiled or not.
        path: The file, `*.onnx`.
        images: A constant input `[B, ...]` as the network is used on, at best 8 or more: the file is run on them.
        steps: T. With `streaming`, T to check over, which the file does not depend on.
        streaming: Export one step. Its size does not grow with T, and every step may have images of its own.
        dynamic_batch: Whether the file takes batches of any size, or only of that of `images`.
        opset: Version of the ONNX operators; by default what torch's exporter prefers.
        class_names: Names of the K classes, for the metadata.

    Returns:
        The receipt, with the comparison of network and file: by ONNX Runtime if it is installed, else by the reference
        implementation of ONNX, which is slow.

    Raises:
        ExportError: The network cannot be traced, or the file computes something else; nothing was written.
        ImportError: onnx or onnxscript is missing.
        OSError: The file could not be written; an older one is untouched.
        TypeError: `model` is no such network, or `images` is no tensor of float32.
        ValueError: Images that the network does not take, steps or opset out of range, parameters that are not float32
            or too large for one file, or a file name that does not end in `.onnx`.

    >>> import tempfile
    >>> from ranvier.models import mlp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     receipt = to_onnx(mlp([16, 8, 3]), f"{folder}/mlp.onnx", images=torch.rand(8, 16), steps=2)
    >>> [port.sizes for port in (*receipt.inputs, *receipt.outputs)]
    ['[batch, 16]', '[2, batch, 3]']
    """
    _check_installed()
    check_ending(path, ".onnx")
    with torch.inference_mode(False), torch.no_grad():
        prepared = prepare(model, images, steps, streaming, dynamic_batch, class_names)
        size = sum(tensor.nbytes for tensor in prepared.network.state_dict().values())
        if size > LARGEST:
            raise ValueError(
                f"the network has {size:,} bytes of weights, but an ONNX file holds {LARGEST:,}. Use to_program."
            )
        with replacing(path) as temporary:
            capture = capture_network(prepared)
            proto = _translate(capture, opset)
            temporary.write_bytes(proto.SerializeToString())
            engine, call = _reader(temporary, capture.inputs)
            return Receipt(
                path=str(path),
                format="onnx",
                opset=_opset(proto),
                bytes=temporary.stat().st_size,
                checked_with=engine,
                versions=provenance.versions() | {name: metadata.version(name) for name in ("onnx", "onnxscript")},
                **confirmed(prepared, capture, call),
            )


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"export to ONNX needs onnx and onnxscript ({error}). Install them: pip install 'ranvier[export]'."
        ) from error


def _translate(capture: Capture, opset: int | None) -> Any:
    """The ONNX model of a traced network, as protobuf."""
    import onnx

    with without_exporter_noise():
        exported = torch.onnx.export(
            capture.program,
            dynamo=True,
            input_names=[port.name for port in capture.inputs],
            output_names=[port.name for port in capture.outputs],
            opset_version=opset,
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    if opset is not None and _opset(proto) != opset:
        raise ValueError(
            f"opset is {opset}, but the exporter of torch {torch.__version__} could only write {_opset(proto)}. "
            "Pass opset=18 or a little more, or leave it out."
        )
    _name_batch(proto, capture.inputs[0])
    _forget_source(proto)
    proto.graph.name = "ranvier"
    onnx.helper.set_model_props(
        proto,
        {
            f"ranvier.{'version' if key == 'ranvier' else key}": value if isinstance(value, str) else json.dumps(value)
            for key, value in capture.card.items()
        },
    )
    onnx.checker.check_model(proto)
    return proto


def _opset(proto: Any) -> int:
    """Version of the standard operators."""
    return next(entry.version for entry in proto.opset_import if not entry.domain)


def _name_batch(proto: Any, images: Port) -> None:
    """Call the open axis `batch`; the tracer has a symbol of its own for it."""
    if images.shape[0] != BATCH:
        return
    graph = proto.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", BATCH, size.dim_param)


def _forget_source(proto: Any) -> None:
    """Drop what the exporter noted at every operation: lines of source with their paths."""
    graph = proto.graph
    for entry in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del entry.metadata_props[:]
        entry.doc_string = ""


def _reader(path: Path, inputs: tuple[Port, ...]) -> tuple[str, Runner]:
    """What runs the file, and the file as a function."""
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors, which are raised too
        try:
            session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no other base
            raise ExportError(
                f"ONNX Runtime {onnxruntime.__version__} cannot read the file: {error} "
                "Pass a smaller opset, or install a newer one: pip install --upgrade onnxruntime."
            ) from error
        engine = f"onnxruntime {onnxruntime.__version__}"
    else:
        import onnx
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(str(path))
        engine = f"onnx.reference {onnx.__version__}, because onnxruntime is not installed"

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        feed = {port.name: tensor.numpy() for port, tensor in zip(inputs, tensors, strict=True)}
        return tuple(torch.as_tensor(value) for value in session.run(None, feed))

    return engine, call
