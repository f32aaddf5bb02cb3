"""What a neuron computes: pure functions, the reference that everything faster is tested against."""

from ranvier.dynamics.affine import AffineParams, affine_scan, affine_step
from ranvier.dynamics.burst import (
    LIFBParams,
    LIFPairParams,
    lif_pair_scan,
    lif_pair_step,
    lifb_scan,
    lifb_step,
)
from ranvier.dynamics.converted import ConvertedState, converted_scan, converted_step
from ranvier.dynamics.integrate_and_fire import (
    IFParams,
    LIFParams,
    PLIFParams,
    if_scan,
    if_step,
    lif_scan,
    lif_step,
    plif_scan,
    plif_step,
)
from ranvier.dynamics.leaky_mean import LeakyMeanState, leaky_mean
from ranvier.dynamics.max_pool import SummedState, max_pool_of_sums
from ranvier.dynamics.quantized import qcfs
from ranvier.dynamics.rectified import clip, relu
from ranvier.dynamics.reset import Reset, reset
from ranvier.dynamics.scan import NeuronState, scan
from ranvier.dynamics.surrogate import ATan, Rectangle, Sigmoid, Surrogate, Triangle, spike

__all__ = [
    "ATan",
    "AffineParams",
    "ConvertedState",
    "IFParams",
    "LIFBParams",
    "LIFPairParams",
    "LIFParams",
    "LeakyMeanState",
    "NeuronState",
    "PLIFParams",
    "Rectangle",
    "Reset",
    "Sigmoid",
    "SummedState",
    "Surrogate",
    "Triangle",
    "affine_scan",
    "affine_step",
    "clip",
    "converted_scan",
    "converted_step",
    "if_scan",
    "if_step",
    "leaky_mean",
    "lif_pair_scan",
    "lif_pair_step",
    "lif_scan",
    "lif_step",
    "lifb_scan",
    "lifb_step",
    "max_pool_of_sums",
    "plif_scan",
    "plif_step",
    "qcfs",
    "relu",
    "reset",
    "scan",
    "spike",
]
