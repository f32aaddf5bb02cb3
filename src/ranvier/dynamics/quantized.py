"""The quantised activation QCFS: what integrate-and-fire neurons with soft reset compute in a whole number of steps."""

import torch
from torch import Tensor

from ranvier.dynamics.rectified import clip
from ranvier.dynamics.scan import per_channel


def qcfs(x: Tensor, ceiling: Tensor, levels: int) -> Tensor:
    """Quantisation clip-floor-shift: ReLU, clipped at a learned ceiling and rounded to `levels` steps below it.

        y = ceiling / levels * clip(floor(x levels / ceiling + 1/2), 0, levels)

    Gradients: the floor passes its gradient straight through, so that they are those of a clip from half a step below
    zero to half a step below the ceiling. Between the two dy/dx = 1 and dy/dceiling = (y - x) / ceiling; below them
    both are 0; above, dy/dx = 0 and dy/dceiling = 1.

    An integrate-and-fire neuron with threshold `ceiling`, soft reset and initial potential `ceiling / 2` that receives
    the constant current x fires `levels y / ceiling` times in `levels` steps: the two agree exactly.

    Args:
        x: Any shape, or `[B, C, ...]` where the ceiling has one value per channel.
        ceiling: Greater than 0; a scalar, or `[C]`.
        levels: L >= 1, values above zero that y can take.

    Returns:
        Shape and dtype of `x`; computed in float32 or better, because at bfloat16 rounding would move levels.

    Source: Bu et al. 2022, "Optimal ANN-SNN Conversion for High-accuracy and Ultra-low-latency Spiking Neural
    Networks", ICLR, equations 9 and 10. Differs from its released code in: that clips before it adds the shift of 1/2,
    which stops the gradient at 0 and at the ceiling instead of half a step below each.

    >>> qcfs(torch.tensor([-1.0, 0.2, 0.3, 0.9, 5.0]), torch.tensor(1.0), levels=2).tolist()
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    if ceiling.ndim:
        ceiling = per_channel(ceiling, x)
    scaled = x.to(torch.promote_types(x.dtype, torch.float32)) * (levels / ceiling) + 0.5
    # Clipped first: behind the floor, the clip would pass the gradient of the whole top level, a step too far.
    clipped = clip(scaled, 0, levels)
    rounded = clipped + (clipped.floor() - clipped).detach()
    return (rounded * (ceiling / levels)).to(x.dtype)
