"""Conversion of trained ANNs to spiking networks of few steps, by forward passes alone."""

from ranvier.conversion.account import Account, Candidate, LayerAccount
from ranvier.conversion.convert import Settings, convert
from ranvier.conversion.spiking import ConvertedSNN
from ranvier.conversion.storage import load, save
from ranvier.conversion.threshold import Activations, observe, thresholds
from ranvier.conversion.trace import ConversionError, trace

__all__ = [
    "Account",
    "Activations",
    "Candidate",
    "ConversionError",
    "ConvertedSNN",
    "LayerAccount",
    "Settings",
    "convert",
    "load",
    "observe",
    "save",
    "thresholds",
    "trace",
]
