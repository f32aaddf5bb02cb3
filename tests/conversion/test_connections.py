"""Connections against the layer itself: an output is connected to an input if it changes with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranvier.conversion.connections import connections, reach
from ranvier.conversion.vocabulary import ChannelAffine


def reached(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Outputs that change with each input, `shape`; with weights of 1, so that nothing cancels."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
        count = torch.Size(shape).numel()
        units = torch.eye(count).view(count, *shape)
        return (layer(units) - layer(0 * units)).flatten(1).sum(1).view(shape)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    dims=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    sizes=st.tuples(st.integers(7, 9), st.integers(7, 8)),
)
def test_any_convolution(
    dims: int, groups: int, kernel: int, stride: int, dilation: int, padding: int | str, sizes: tuple[int, ...]
) -> None:
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    stride = 1 if padding == "same" else stride
    layer = kind(2 * groups, 3 * groups, kernel, stride, padding, dilation, groups)
    shape = (2 * groups, *sizes[:dims])
    expected = reached(layer, shape)
    assert reach(layer, shape).tolist() == expected[0].flatten().tolist()
    assert torch.equal(expected, expected[:1].expand_as(expected))
    assert connections(layer, shape) == expected.sum()


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [(nn.Linear(4, 3), (4,), 12), (nn.Linear(4, 3), (5, 4), 60), (ChannelAffine(4), (4, 2, 2), 16)],
    ids=["linear", "rows", "affine"],
)
def test_other_layers(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert connections(layer, shape) == expected == reached(layer, shape).sum()
