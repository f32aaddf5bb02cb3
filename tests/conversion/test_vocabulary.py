import json
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ranvier.conversion.trace import trace
from ranvier.conversion.vocabulary import (
    FUNCTIONS,
    MODULES,
    ModuleKind,
    Rectifier,
    from_json,
    reshape_samples,
    slice_axis,
    to_json,
)
from ranvier.nn import QCFS


def small() -> fx.GraphModule:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding="same", groups=2), nn.BatchNorm2d(4), QCFS(levels=4), nn.AvgPool2d(2)
    return trace(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3), nn.ReLU6()), torch.rand(2, 2, 4, 4))


class Shifted(nn.Module):
    """A user's module with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.25, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x - self.mean)


def test_rectifier() -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 7.0])
    assert Rectifier()(x).tolist() == [0.0, 0.0, 0.5, 7.0]
    assert Rectifier(6.0)(x).tolist() == [0.0, 0.0, 0.5, 6.0]
    with pytest.raises(ValueError, match=r"ceiling is 0, but must be greater than 0, or None"):
        Rectifier(0)


def test_functions_leave_samples_apart() -> None:
    x = torch.arange(12.0).view(2, 6)
    assert reshape_samples(x, [2, 3])[1].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert slice_axis(x, 1, 1, 6, 2)[0].tolist() == [1, 3, 5]
    assert FUNCTIONS["mean_axes"](x, [1], False).tolist() == [2.5, 8.5]
    assert FUNCTIONS["sum_axes"](x, [1], True).tolist() == [[15.0], [51.0]]


def test_round_trip_through_text() -> None:
    graph = small()
    loaded = from_json(json.loads(json.dumps(to_json(graph))))
    own, others = graph.state_dict(), loaded.state_dict()
    assert {name: tensor.shape for name, tensor in own.items()} == {
        name: tensor.shape for name, tensor in others.items()
    }
    loaded.load_state_dict(own)
    images = torch.rand(5, 2, 4, 4)
    torch.testing.assert_close(loaded(images), graph(images), rtol=1e-6, atol=0)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_content_is_plain() -> None:
    content = to_json(small())
    assert list(content["modules"]) == ["0", "2", "5", "6"]
    assert content["modules"]["0"] == {
        "class": "Conv2d",
        "arguments": {
            "in_channels": 2,
            "out_channels": 4,
            "kernel_size": [3, 3],
            "stride": [1, 1],
            "padding": [1, 1],
            "dilation": [1, 1],
            "groups": 2,
            "bias": True,
        },
    }
    assert content["modules"]["2"] == {"class": "QCFS", "arguments": {"levels": 4}}
    assert content["modules"]["6"] == {"class": "Rectifier", "arguments": {"ceiling": 6.0}}
    assert content["nodes"][1] == {
        "name": "_0",
        "op": "call_module",
        "target": "0",
        "args": [{"node": "images"}],
        "kwargs": {},
    }


def test_constants_are_buffers() -> None:
    graph = trace(Shifted(), torch.rand(3, 2))
    content = to_json(graph)
    assert content["constants"] == {"constant": [2]}
    loaded = from_json(content)
    assert torch.equal(loaded(torch.ones(1, 2)), torch.ones(1, 2)), "zeros until the tensors are loaded"
    loaded.load_state_dict(graph.state_dict())
    assert loaded(torch.ones(1, 2)).tolist() == [[0.75, 0.5]]


def test_loading_leaves_random_numbers_alone() -> None:
    content = to_json(small())
    state = torch.random.get_rng_state()
    from_json(content)
    assert torch.equal(torch.random.get_rng_state(), state)


class Doubling(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return x * 2**self.times


def halve(x: Tensor) -> Tensor:
    return x / 2


def test_vocabulary_can_be_extended() -> None:
    graph = fx.Graph()
    doubled = graph.call_module("twice", (graph.placeholder("x"),))
    graph.output(graph.call_function(halve, (doubled,)))
    module = fx.GraphModule({"twice": Doubling(times=3)}, graph)
    with pytest.raises(ValueError, match=r"module twice is a Doubling, which is not one of ChannelAffine, Conv1d"):
        to_json(module)
    modules = MODULES | {"Doubling": ModuleKind(Doubling, lambda module: {"times": module.times})}
    with pytest.raises(ValueError, match=r"node halve calls .*halve.*, which is not one of adaptive_avg_pool1d"):
        to_json(module, modules)
    functions = FUNCTIONS | {"halve": halve}
    loaded = from_json(to_json(module, modules, functions), modules, functions)
    assert loaded(torch.ones(1)).tolist() == [4.0]
    assert "halve" not in FUNCTIONS


def test_what_json_cannot_say_is_refused() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(FUNCTIONS["mul"], (graph.placeholder("x"), 1j)))
    with pytest.raises(ValueError, match=r"an argument is 1j, a complex, which json cannot say"):
        to_json(fx.GraphModule({}, graph))
    graph = fx.Graph()
    graph.output(graph.call_method("relu", (graph.placeholder("x"),)))
    with pytest.raises(ValueError, match=r"node relu is a call_method, which a traced network does not have"):
        to_json(fx.GraphModule({}, graph))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"modules": {"0": {"class": "Conv4d", "arguments": {}}}},
            r"module 0 is a 'Conv4d', which is not one of .*version",
        ),
        ({"nodes": [{"op": "call_function", "target": "fft"}]}, r"node x calls 'fft', which is not one of .*version"),
        (
            {"nodes": [{"op": "call_method", "target": "relu"}]},
            r"node x is a call_method: .*another version of ranvier",
        ),
    ],
)
def test_unknown_entries_of_a_file_are_named(change: dict[str, Any], message: str) -> None:
    content = {"nodes": [], "modules": {}, "constants": {}} | change
    for node in content["nodes"]:
        node |= {"name": "x", "args": [], "kwargs": {}}
    with pytest.raises(ValueError, match=message):
        from_json(content)
