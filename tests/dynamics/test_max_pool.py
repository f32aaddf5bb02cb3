import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ranvier.dynamics import max_pool_of_sums


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)


def test_by_hand() -> None:
    """Sums (1, 0), (1, 3), (5, 3) have the maxima 1, 3 and 5."""
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0], [4.0, 0.0]]).view(3, 1, 1, 1, 2)
    y, state = max_pool_of_sums(x, lambda sums: F.max_pool2d(sums, (1, 2)))
    assert y.flatten().tolist() == [1, 2, 2]
    assert state.total.flatten().tolist() == [5, 3]


@given(steps=st.integers(1, 5), cut=st.integers(0, 5), seed=st.integers(0, 99))
def test_sums_are_pooled_and_cuts_change_nothing(steps: int, cut: int, seed: int) -> None:
    x = torch.randn(steps, 2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    y, state = max_pool_of_sums(x, pool)
    torch.testing.assert_close(y.sum(0), pool(x.sum(0)), rtol=1e-5, atol=1e-5)
    if 0 < cut < steps:
        first, middle = max_pool_of_sums(x[:cut], pool)
        second, end = max_pool_of_sums(x[cut:], pool, middle)
        assert torch.equal(torch.cat((first, second)), y)
        assert torch.equal(end.total, state.total)


def test_of_one_step_it_is_max_pooling() -> None:
    x = torch.randn(1, 2, 3, 5, 5)
    assert torch.equal(max_pool_of_sums(x, pool)[0][0], pool(x[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sums_are_wide(dtype: torch.dtype) -> None:
    """In bfloat16 256 + 1 is 256, so that sums there would stand still."""
    x = torch.ones(300, 1, 1, 3, 3, dtype=dtype)
    y, state = max_pool_of_sums(x, pool)
    assert y.dtype == dtype
    assert bool((y == 1).all())
    assert state.total.dtype == torch.promote_types(dtype, torch.float32)


def test_memory_layout_stays() -> None:
    x = torch.randn(6, 4, 5, 5).contiguous(memory_format=torch.channels_last).unflatten(0, (3, 2))
    y, _ = max_pool_of_sums(x, pool)
    assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
