"""What watches a module from outside."""

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks see or change what goes in or comes out of a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
