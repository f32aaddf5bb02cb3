"""Modules: neurons as drop-in activations, time folding, normalisation, readout."""

from ranvier.nn.affine import AffineIF
from ranvier.nn.converted import ConvertedIF
from ranvier.nn.foreign import from_snntorch, from_spikingjelly
from ranvier.nn.memory import keep_plainly, pack_spikes, recompute_norms
from ranvier.nn.neurons import IF, LIF, LIFB, PLIF, LIFPair, Neuron
from ranvier.nn.normalization import BatchNorm
from ranvier.nn.proxy import ProxyActivation, ProxyNorm, analog
from ranvier.nn.quantized import QCFS
from ranvier.nn.readout import Readout
from ranvier.nn.rectified import ReLU
from ranvier.nn.time import Carry, TimeFolded, fire, fold_time, repeat, unfold_time

__all__ = [
    "IF",
    "LIF",
    "LIFB",
    "PLIF",
    "QCFS",
    "AffineIF",
    "BatchNorm",
    "Carry",
    "ConvertedIF",
    "LIFPair",
    "Neuron",
    "ProxyActivation",
    "ProxyNorm",
    "ReLU",
    "Readout",
    "TimeFolded",
    "analog",
    "fire",
    "fold_time",
    "from_snntorch",
    "from_spikingjelly",
    "keep_plainly",
    "pack_spikes",
    "recompute_norms",
    "repeat",
    "unfold_time",
]
