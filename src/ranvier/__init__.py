"""Ranvier: accurate spiking neural networks that answer in one to a few time steps.

>>> import torch, ranvier as rv
>>> model = rv.models.mlp([64, 32, 10], neuron=rv.nn.LIFB)
>>> logits = model(torch.rand(16, 64), steps=4)         # [T, B, K]
>>> loss = rv.losses.cross_entropy(logits, torch.arange(16) % 10) + rv.losses.temporal_consistency(logits)
>>> loss.backward()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ranvier import data, dynamics, kernels, losses, models, nn, weights
from ranvier.kernels import explain

if TYPE_CHECKING:
    from ranvier import conversion, evaluation, export, recipes, report, training
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

# Loaded when they are first asked for: whoever imports ranvier for its networks does not wait for these.
_LATER = {
    "conversion": "ranvier.conversion",
    "evaluation": "ranvier.evaluation",
    "export": "ranvier.export",
    "from_pretrained": "ranvier.recipes",
    "push_to_hub": "ranvier.recipes",
    "recipes": "ranvier.recipes",
    "report": "ranvier.report",
    "training": "ranvier.training",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'ranvier' has no attribute {name!r}")
    module = import_module(_LATER[name])
    return module if _LATER[name] == f"ranvier.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
