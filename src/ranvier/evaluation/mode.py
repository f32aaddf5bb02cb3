"""How and where a model runs: evaluation mode, put back afterwards, and its device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode in a block; then each module's own mode again, such as that of a frozen normalisation."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter of a model is, or its first buffer; the CPU if it has neither."""
    tensors = (tensor for found in (model.parameters(), model.buffers()) for tensor in found)
    first = next(tensors, None)
    return torch.device("cpu") if first is None else first.device
