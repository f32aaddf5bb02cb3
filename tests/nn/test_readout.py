"""The classifier at every step."""

import pytest
import torch

from ranvier.nn import Readout


@pytest.mark.parametrize("shape", [(4, 2, 12), (4, 2, 3, 2, 2), (1, 1, 12), (4, 0, 12)])
def test_shapes(shape: tuple[int, ...]) -> None:
    assert Readout(12, 5)(torch.rand(shape)).shape == (*shape[:2], 5)


def test_each_step_stands_for_itself() -> None:
    """Nothing is accumulated: logits of step t depend on step t alone, and equal those of a plain linear layer."""
    torch.manual_seed(0)
    readout = Readout(6, 3).double()
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    logits = readout(x)
    # Float64, and a matrix product may add in another order.
    torch.testing.assert_close(logits, x @ readout[1].weight.T + readout[1].bias, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(logits[2].sum(), x)
    assert (gradient[2] != 0).all()
    assert gradient[[0, 1, 3]].abs().max() == 0


def test_wrong_feature_count_raises() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Readout(12, 5)(torch.rand(4, 2, 13))
