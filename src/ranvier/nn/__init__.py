"""Modules: neurons as drop-in activations, time folding, normalisation, readout."""

from ranvier.nn.converted import ConvertedIF
from ranvier.nn.neurons import IF, LIF, LIFB, PLIF, Neuron
from ranvier.nn.normalization import BatchNorm
from ranvier.nn.quantized import QCFS
from ranvier.nn.readout import Readout
from ranvier.nn.time import Carry, TimeFolded, fire, fold_time, repeat, unfold_time

__all__ = [
    "IF",
    "LIF",
    "LIFB",
    "PLIF",
    "QCFS",
    "BatchNorm",
    "Carry",
    "ConvertedIF",
    "Neuron",
    "Readout",
    "TimeFolded",
    "fire",
    "fold_time",
    "repeat",
    "unfold_time",
]
