"""Networks as files that run without ranvier."""

from ranvier.export.inference import Agreement, InferenceNetwork, agreement, to_inference
from ranvier.export.nir import NIRReceipt, from_nir, to_nir
from ranvier.export.onnx import to_onnx
from ranvier.export.program import to_program
from ranvier.export.receipt import ExportError, Port, Receipt

__all__ = [
    "Agreement",
    "ExportError",
    "InferenceNetwork",
    "NIRReceipt",
    "Port",
    "Receipt",
    "agreement",
    "from_nir",
    "to_inference",
    "to_nir",
    "to_onnx",
    "to_program",
]
