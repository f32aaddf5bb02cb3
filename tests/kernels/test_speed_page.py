"""docs/speed.md: its example runs, and a neuron of one's own gets what the page promises."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ranvier import kernels
from ranvier.dynamics import LIFParams
from ranvier.provenance import cpp_compiler

PAGE = (Path(__file__).parents[2] / "docs" / "speed.md").read_text()

needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def leave_no_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the python blocks of the page define, run one after the other."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    return names


def test_example_runs(page: dict[str, Any]) -> None:
    assert set(page["spikes"].unique().tolist()) == {0, 1}
    assert page["neuron"].leak.grad.any()
    logits = page["model"](torch.rand(3, 64), steps=2)
    assert logits.shape == (2, 3, 10)


@needs_compiler
def test_a_neuron_of_ones_own_compiles_to_one_graph_that_equals_the_reference(page: dict[str, Any]) -> None:
    torch.manual_seed(0)
    # Multiples of 1/64 and a leak of 1/2: exact in binary, so that no fused operation moves a spike.
    current = torch.randint(-64, 192, (4, 3, 8, 5, 7)) / 64
    upstream = torch.randn(4, 3, 8, 5, 7)
    results = []
    before = counters["stats"]["unique_graphs"]
    for implementation in ("reference", "compiled"):
        neuron, x = page["ChannelLIF"](8, implementation), current.clone().requires_grad_()
        spikes = neuron(x)
        results.append((spikes, torch.autograd.grad((spikes * upstream).sum(), [x, neuron.leak])))
    assert counters["stats"]["unique_graphs"] == before + 1
    (expected, wanted), (got, gradients) = results
    assert torch.equal(got, expected)
    assert 0 < got.mean() < 1
    for ours, theirs in zip(gradients, wanted, strict=True):
        # Sums of up to 420 float32 values in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def elements_kept(run: Any) -> int:
    """Elements of all tensors that autograd keeps for backward."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(tensor.numel() for tensor in kept.values())


@needs_compiler
def test_a_neuron_of_ones_own_keeps_its_input_alone(page: dict[str, Any]) -> None:
    """As the built-in ones do: bytes kept are bytes to be written and read again, which is what a pass costs."""
    current = torch.randn(4, 3, 8, 5, 7).requires_grad_()
    own, eager = page["ChannelLIF"](8, "compiled"), page["ChannelLIF"](8, "reference")
    built_in = elements_kept(lambda: kernels.lif_scan(current, None, LIFParams(), implementation="compiled"))
    assert built_in == current.numel()
    assert elements_kept(lambda: own(current)) <= current.numel() + 2 * 8  # and the leak of each channel
    assert elements_kept(lambda: eager(current)) >= 2 * current.numel()
