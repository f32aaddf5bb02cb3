"""How neurons run fast: the scans of `ranvier.dynamics` with an `implementation=` argument."""

from ranvier.kernels.converted import converted_scan
from ranvier.kernels.convolution import explain_convolutions
from ranvier.kernels.dispatch import Choice, Implementation, choose, compile_whole, explain
from ranvier.kernels.precision import Precision, choose_precision
from ranvier.kernels.scan import if_scan, lif_scan, lifb_scan, plif_scan, scan

__all__ = [
    "Choice",
    "Implementation",
    "Precision",
    "choose",
    "choose_precision",
    "compile_whole",
    "converted_scan",
    "explain",
    "explain_convolutions",
    "if_scan",
    "lif_scan",
    "lifb_scan",
    "plif_scan",
    "scan",
]
