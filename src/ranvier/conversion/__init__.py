"""Conversion of trained ANNs to spiking networks of few steps, by forward passes alone."""

from ranvier.conversion.account import Account, Candidate, LayerAccount
from ranvier.conversion.convert import convert
from ranvier.conversion.decouple import DecoupledSNN, Decoupling, decouple
from ranvier.conversion.search import Search, Settings, Trial
from ranvier.conversion.spiking import ConvertedSNN, GraphSNN
from ranvier.conversion.storage import KIND, from_card, load, save
from ranvier.conversion.threshold import Activations, observe, thresholds
from ranvier.conversion.trace import ConversionError, trace
from ranvier.conversion.trace_network import TracedNetwork, trace_network

__all__ = [
    "KIND",
    "Account",
    "Activations",
    "Candidate",
    "ConversionError",
    "ConvertedSNN",
    "DecoupledSNN",
    "Decoupling",
    "GraphSNN",
    "LayerAccount",
    "Search",
    "Settings",
    "TracedNetwork",
    "Trial",
    "convert",
    "decouple",
    "from_card",
    "load",
    "observe",
    "save",
    "thresholds",
    "trace",
    "trace_network",
]
