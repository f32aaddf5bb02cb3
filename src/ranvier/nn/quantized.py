"""The quantised activation of ANNs that are trained to be converted."""

import torch
from torch import Tensor, nn

from ranvier.checks import check_channels, check_count, check_positive
from ranvier.dynamics import qcfs


class QCFS(nn.Module):
    """Quantised ReLU with a learned ceiling, one for the layer: `ranvier.dynamics.qcfs` as a module.

        y = ceiling / levels * clip(floor(x levels / ceiling + 1/2), 0, levels)

    Put it in place of ReLU, train, and convert with `threshold="qcfs"`: the ceiling becomes the threshold.

    Args:
        num_channels: Not used; accepted so that models can build any activation alike.
        levels: L, a whole number of at least 1. 4 is best for few time steps, 8 has the more accurate ANN.
        ceiling_init: Initial ceiling; the paper has 8. Inputs that a normalisation brought to unit variance rarely
            exceed 4.

    Shape: any.

    >>> QCFS(levels=2, ceiling_init=1.0)(torch.tensor([-1.0, 0.3, 5.0])).tolist()
    [0.0, 0.5, 1.0]
    """

    def __init__(self, num_channels: int | None = None, *, levels: int = 8, ceiling_init: float = 4.0) -> None:
        super().__init__()
        check_channels(num_channels)
        check_count("levels", levels)
        check_positive("ceiling_init", ceiling_init)
        self.levels = levels
        self.ceiling = nn.Parameter(torch.tensor(float(ceiling_init)))

    def forward(self, x: Tensor) -> Tensor:
        """Quantise `x`."""
        return qcfs(x, self.ceiling, self.levels)

    def extra_repr(self) -> str:
        """Settings, as printed; the ceiling as it is now."""
        return f"levels={self.levels}, ceiling={self.ceiling.item():.3g}"
