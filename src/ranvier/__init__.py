"""Ranvier: accurate spiking neural networks that answer in one to a few time steps.

>>> import torch, ranvier as rv
>>> model = rv.models.mlp([64, 32, 10], neuron=rv.nn.LIFB)
>>> logits = model(torch.rand(16, 64), steps=4)         # [T, B, K]
>>> loss = rv.losses.cross_entropy(logits, torch.arange(16) % 10) + rv.losses.temporal_consistency(logits)
>>> loss.backward()
"""

from ranvier import (
    conversion,
    data,
    dynamics,
    evaluation,
    export,
    kernels,
    losses,
    models,
    nn,
    recipes,
    report,
    training,
    weights,
)
from ranvier.kernels import explain
from ranvier.recipes import from_pretrained, push_to_hub

__version__ = "0.1.0.dev0"

__all__ = [
    "__version__",
    "conversion",
    "data",
    "dynamics",
    "evaluation",
    "explain",
    "export",
    "from_pretrained",
    "kernels",
    "losses",
    "models",
    "nn",
    "push_to_hub",
    "recipes",
    "report",
    "training",
    "weights",
]
