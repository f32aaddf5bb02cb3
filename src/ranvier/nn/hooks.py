"""What watches a module from outside, or stands in for it."""

from torch import nn
from torch.nn.modules import module as every_module


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks, its own or those of all modules, see its inputs or outputs, or it has a `forward` of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
        or "forward" in module.__dict__
    )
