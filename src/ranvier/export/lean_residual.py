"""Residual blocks of networks that only run, whose sums take no memory of their own."""

import torch
from torch import Tensor, nn

from ranvier.export.lean_neurons import Lean
from ranvier.nn import Carry
from ranvier.nn.hooks import is_hooked
from ranvier.nn.structure import Activation, Block, Chain, Residual


def add_in_place(network: nn.Module) -> None:
    """Let the residual blocks of a network add the shortcut to the spikes of the branch where those lie, in place.

    Args:
        network: Made ready otherwise, with lean neurons.
    """
    for block in list(network.modules()):
        if type(block) is Residual:
            block.__class__ = LeanResidual


class LeanResidual(Residual):
    """A residual block that only runs: `y = branch(x); y += shortcut(x)`.

    Spikes that neurons have just sent belong to nobody else, unless a hook keeps them. Memory for the sum, new in every
    call, costs several times what adding does.
    """

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Run the branch, then the shortcut, on `[T, B, ...]`; the other way round where neurons write the sum."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _sends_its_own(self.branch):
            return super().forward(x, carry)
        if carry is None and isinstance(self.branch, Chain) and self.branch.can_add:
            return super().forward(x, carry)
        y, shortcut = self.branch(x, carry), self.shortcut(x, carry)
        if y.shape != shortcut.shape or y.dtype != shortcut.dtype:
            return torch.add(y, shortcut)
        return y.add_(shortcut)


def _sends_its_own(branch: Block) -> bool:
    """Whether what leaves a branch was written by its neurons in this call, and seen by nobody."""
    if not isinstance(branch, Chain) or len(branch.layers) == 0 or is_hooked(branch):
        return False
    last = branch.layers[-1]
    if type(last) is not Activation or is_hooked(last):
        return False
    return isinstance(last.neuron, Lean) and not is_hooked(last.neuron)
