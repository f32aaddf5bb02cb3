"""Networks: plain functions that build them. `neuron=` is a neuron class or any factory called with a channel count."""

from ranvier.models.mlp import mlp
from ranvier.models.network import Network, SpikingNetwork
from ranvier.models.resnet import resnet9, resnet19, resnet20
from ranvier.models.sew_resnet import sew_resnet18, sew_resnet34
from ranvier.models.spikformer import spikformer
from ranvier.models.vgg import conv4, snn6, vgg, vgg16, vggsnn

__all__ = [
    "Network",
    "SpikingNetwork",
    "conv4",
    "mlp",
    "resnet9",
    "resnet19",
    "resnet20",
    "sew_resnet18",
    "sew_resnet34",
    "snn6",
    "spikformer",
    "vgg",
    "vgg16",
    "vggsnn",
]
