"""Networks: plain functions that build them. `neuron=` is a neuron class or any factory called with the channel count."""

from ranvier.models.mlp import mlp
from ranvier.models.network import Network
from ranvier.models.vgg import snn6, vgg, vgg16, vggsnn

__all__ = ["Network", "mlp", "snn6", "vgg", "vgg16", "vggsnn"]
