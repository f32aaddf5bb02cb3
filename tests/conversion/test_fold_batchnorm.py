from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from ranvier.conversion.fold_batchnorm import absorb, scale_and_shift
from ranvier.conversion.trace import trace
from ranvier.conversion.vocabulary import ChannelAffine

from .architectures import with_statistics


def modules(graph: fx.GraphModule) -> dict[str, str]:
    return {
        node.target: type(graph.get_submodule(node.target)).__name__
        for node in graph.graph.nodes
        if node.op == "call_module"
    }


def test_scale_and_shift_by_hand() -> None:
    # variance 3 + eps 1 = 4: scale = 6 / 2 = 3, shift = 1 - 2 * 3 = -5
    scale, shift = scale_and_shift(
        torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([6.0]), torch.tensor([1.0]), eps=1.0
    )
    assert (scale.tolist(), shift.tolist()) == ([3.0], [-5.0])
    scale, shift = scale_and_shift(torch.tensor([2.0]), torch.tensor([3.0]), None, None, eps=1.0)
    assert (scale.tolist(), shift.tolist()) == ([0.5], [-1.0])


def test_absorb_by_hand() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    absorb(layer, torch.tensor([10.0, 100.0]), torch.tensor([5.0, 6.0]))
    assert layer.weight.tolist() == [[10.0, 20.0], [300.0, 400.0]]
    assert layer.bias.tolist() == [5.0, 6.0]


LAYERS: dict[str, tuple[Callable[..., nn.Module], Callable[[int], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda groups, bias: nn.Linear(4, 8, bias=bias), nn.BatchNorm1d, (4,)),
    "conv1d": (lambda groups, bias: nn.Conv1d(4, 8, 3, groups=groups, bias=bias), nn.BatchNorm1d, (4, 5)),
    "conv2d": (
        lambda groups, bias: nn.Conv2d(4, 8, 3, 2, groups=groups, bias=bias, padding=1, padding_mode="circular"),
        nn.BatchNorm2d,
        (4, 5, 5),
    ),
}


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_folded_equals_layer_and_norm(kind: str, groups: int, bias: bool, affine: bool, eps: float, seed: int) -> None:
    layer, norm, shape = LAYERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ann = (
            nn.Sequential(layer(groups, bias), norm(8, eps=eps, affine=affine), nn.ReLU(), nn.Flatten()).double().eval()
        )
        ann[1].running_mean.normal_()
        ann[1].running_var.uniform_(0.01, 2.0)
        if affine:
            nn.init.normal_(ann[1].weight)
            nn.init.normal_(ann[1].bias)
        images = torch.randn(3, *shape, dtype=torch.float64)
        graph = trace(ann, images)
    assert "1" not in modules(graph)
    torch.testing.assert_close(graph(images), ann(images).detach(), rtol=1e-10, atol=1e-10)


class Net(nn.Module):
    """Something between an image `[B, 4, 6, 6]` and logits."""

    def __init__(self, something: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.something = something
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.something(x, *self.parts).relu().flatten(1)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3)


@pytest.mark.parametrize(
    ("something", "parts", "expected"),
    [
        # two in a row
        (lambda x, a, b, c: c(b(a(x))), (conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), {"parts.0": "Conv2d"}),
        # first of all
        (lambda x, a: a(x), (nn.BatchNorm2d(4),), {"parts.0": "ChannelAffine"}),
        # something else uses the layer
        (
            lambda x, a, b: b(y := a(x)) + y,
            (conv(), nn.BatchNorm2d(4)),
            {"parts.0": "Conv2d", "parts.1": "ChannelAffine"},
        ),
        # pooling stands between
        (
            lambda x, a, b, c: c(b(a(x))),
            (conv(), nn.MaxPool2d(2), nn.BatchNorm2d(4)),
            {"parts.0": "Conv2d", "parts.2": "ChannelAffine"},
        ),
        # channels of the normalisation are not the outputs of the linear layer
        (
            lambda x, a, b: b(a(x.flatten(2))),
            (nn.Linear(36, 4), nn.BatchNorm1d(4)),
            {"parts.0": "Linear", "parts.1": "ChannelAffine"},
        ),
    ],
)
def test_what_is_folded_and_what_stays(
    something: Callable[..., Tensor], parts: tuple[nn.Module, ...], expected: dict[str, str]
) -> None:
    ann = with_statistics(Net(something, *parts)).eval()
    images = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    graph = trace(ann, images)
    assert modules(graph) == expected | {"relu": "Rectifier"}
    torch.testing.assert_close(graph(images), ann(images).detach(), rtol=1e-4, atol=1e-5)


def test_affine_by_hand() -> None:
    affine = ChannelAffine(2)
    affine.scale.copy_(torch.tensor([2.0, -1.0]))
    affine.shift.copy_(torch.tensor([0.5, 0.0]))
    assert affine(torch.ones(1, 2, 1, 1)).flatten().tolist() == [2.5, -1.0]
