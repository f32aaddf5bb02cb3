"""Optimizer and learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ranvier.checks import check_choice, check_positive
from ranvier.nn import QCFS, Neuron


@dataclass(frozen=True)
class Optimization:
    """How parameters are updated.

    The learning rate follows from the step alone, so it needs no state: linear warm-up, then half a cosine,

        lr(s) = lr s / warmup                                                  for s < warmup
                min_lr + (lr - min_lr) (1 + cos(pi (s - warmup) / (total - warmup))) / 2   after.

    Weight decay acts on weights of layers only: not on vectors and numbers, as in normalisation, biases and burst
    strengths, and not on what belongs to a neuron, whatever its shape, such as a bias for each step.
    """

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Update rule; sgd has Nesterov momentum 0.9."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up; fractions are allowed."""
    weight_decay: float = 1e-4
    """Decoupled for adamw, L2 for adam and sgd."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; None for no clipping."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of gradient and squared gradient (adamw, adam)."""

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, ("adamw", "adam", "sgd"))
        check_positive("lr", self.lr)
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, but must lie from 0 to below 1.")
        if self.warmup_epochs < 0 or self.weight_decay < 0 or not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} and weight_decay {self.weight_decay} must not be negative, and "
                f"min_lr {self.min_lr} must lie between 0 and lr {self.lr}."
            )

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer for the parameters of `model`."""
        activations = (module for module in model.modules() if isinstance(module, Neuron | QCFS))
        of_neurons = {id(p) for activation in activations for p in activation.parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = [p for p in trained if p.ndim > 1 and id(p) not in of_neurons]
        others = [p for p in trained if p.ndim <= 1 or id(p) in of_neurons]
        groups = [
            {"params": weights, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True, fused=True)
        adam = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return adam(groups, lr=self.lr, betas=self.betas, fused=True)

    def learning_rate(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Learning rate of update `step`, counted from 0.

        >>> schedule = Optimization(lr=1.0, warmup_epochs=1)
        >>> [round(schedule.learning_rate(step, 8, 2), 3) for step in range(8)]
        [0.5, 1.0, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]
        """
        warmup = min(round(self.warmup_epochs * steps_per_epoch), total_steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = (step - warmup) / max(total_steps - warmup, 1)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2
