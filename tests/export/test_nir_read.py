"""NIR graphs of others against a simulation of their equations, and files that are broken, changed or out of scope."""

import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from ranvier import conversion, models
from ranvier.conversion import decouple
from ranvier.conversion.spiking import GraphSNN
from ranvier.evaluation import count_operations
from ranvier.export import from_nir, to_nir
from ranvier.nn import IF, LIF, LIFB, PLIF, AffineIF, ConvertedIF, LIFPair

from .networks import build

nir = pytest.importorskip("nir")
h5py = pytest.importorskip("h5py")

DT = 1e-3


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# A simulation of NIR


def neuron_step(kind: str, node: Any, x: np.ndarray, v: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray]:
    """One Euler step: the potential before a reset, and after it."""
    h = v + (dt / node.tau * (node.v_leak - v + node.r * x) if kind in ("LIF", "LI") else dt * node.r * x)
    return h, np.where(h > node.v_threshold, node.v_reset, h) if kind in ("LIF", "IF") else h


def rest(kind: str, node: Any) -> Any:
    return {"LIF": "v_leak", "LI": "v_leak", "IF": "v_reset"}.get(kind) and getattr(
        node, "v_leak" if kind in ("LIF", "LI") else "v_reset"
    )


def layer(kind: str, node: Any, x: np.ndarray) -> np.ndarray:
    """Everything without a state, in float64."""
    t = torch.from_numpy(x)
    if kind in ("Affine", "Linear"):
        return x @ node.weight.T + (node.bias if kind == "Affine" else 0)
    if kind in ("Conv1d", "Conv2d"):
        dims = 1 if kind == "Conv1d" else 2
        convolve = F.conv1d if dims == 1 else F.conv2d
        stride, dilation = (np.broadcast_to(value, dims).tolist() for value in (node.stride, node.dilation))
        padding = node.padding if isinstance(node.padding, str) else np.broadcast_to(node.padding, dims).tolist()
        weight, bias = torch.from_numpy(node.weight), torch.from_numpy(node.bias)
        return convolve(t, weight, bias, stride, padding, dilation, int(node.groups)).numpy()
    if kind in ("AvgPool2d", "SumPool2d"):
        kernel, stride, padding = (
            np.broadcast_to(value, 2).tolist() for value in (node.kernel_size, node.stride, node.padding)
        )
        windows = F.unfold(t.flatten(0, 1).unsqueeze(1), kernel, 1, padding, stride)
        total = windows.mean(1) if kind == "AvgPool2d" else windows.sum(1)
        rows = (t.shape[2] + 2 * padding[0] - kernel[0]) // stride[0] + 1
        return total.reshape(*t.shape[:2], rows, -1).numpy()
    assert kind == "Scale"
    return x * node.scale


def simulate(
    graph: Any, images: np.ndarray, steps: int, dt: float, shapes: dict[str, Sequence[int]] | None = None
) -> tuple[np.ndarray, float]:
    """Outputs `[T, B, ...]`, and the smallest distance of a potential from its threshold.

    `shapes` are those to which Flatten nodes bring a sample.
    """
    nodes, edges = graph.nodes, graph.edges
    state: dict[str, np.ndarray] = {}
    outputs, distance = [], np.inf
    for _ in range(steps):
        values: dict[str, np.ndarray] = {}
        while len(values) < len(nodes):
            for name, node in nodes.items():
                sources = [source for source, target in edges if target == name]
                if name in values or any(source not in values for source in sources):
                    continue
                kind = type(node).__name__
                x = sum((values[source] for source in sources), start=np.zeros(())) if sources else images
                if kind in ("Input", "Output"):
                    values[name] = x
                elif kind == "Flatten":
                    assert shapes is not None
                    values[name] = x.reshape(len(x), *shapes[name])
                elif kind in ("LIF", "IF", "LI", "I"):
                    start = rest(kind, node)
                    v = state.get(name, np.broadcast_to(0.0 if start is None else start, x.shape))
                    h, state[name] = neuron_step(kind, node, x, v, dt)
                    if kind in ("LIF", "IF"):
                        distance = min(distance, float(np.abs(h - node.v_threshold).min()))
                        values[name] = (h > node.v_threshold).astype(float)
                    else:
                        values[name] = h
                else:
                    values[name] = layer(kind, node, x)
        outputs.append(next(values[name] for name, node in nodes.items() if type(node).__name__ == "Output"))
    return np.stack(outputs), distance


# Graphs by hand


def chain(shape: Sequence[int], out: Sequence[int], **parts: Any) -> Any:
    """Input, `parts` in order, Output; types as they come, as most writers have them."""
    names = ["input", *parts, "output"]
    nodes = {
        "input": nir.Input(input_type={"input": np.array(shape)}),
        **parts,
        "output": nir.Output(output_type={"output": np.array(out)}),
    }
    return nir.NIRGraph(nodes=nodes, edges=list(pairwise(names)), type_check=False)


def lif(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Numbers for each neuron, of all kinds."""
    return nir.LIF(
        tau=rng.uniform(1, 6, shape) * DT,
        r=rng.uniform(0.5, 2, shape),
        v_leak=rng.normal(0, 0.2, shape),
        v_threshold=rng.uniform(0.2, 0.8, shape),
        v_reset=rng.normal(0, 0.2, shape),
    )


def integrate_and_fire(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return nir.IF(
        r=rng.uniform(200, 2000, shape), v_threshold=rng.uniform(0.2, 0.8, shape), v_reset=rng.normal(0, 0.2, shape)
    )


def affine(rng: np.random.Generator, inputs: int, outputs: int) -> Any:
    return nir.Affine(weight=rng.normal(0, 1, (outputs, inputs)), bias=rng.normal(0, 0.3, outputs))


def conv(rng: np.random.Generator, size: tuple[int, int], inputs: int, outputs: int, **settings: Any) -> Any:
    settings = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1} | settings
    weight = rng.normal(0, 0.5, (outputs, inputs // settings["groups"], 3, 3))
    return nir.Conv2d(input_shape=size, weight=weight, bias=rng.normal(0, 0.2, outputs), **settings)


def pool(kind: str, kernel: Any, stride: Any, padding: Any = (0, 0)) -> Any:
    return getattr(nir, kind)(kernel_size=kernel, stride=stride, padding=padding)


Case = tuple[Any, tuple[int, ...], dict[str, Sequence[int]]]
"""A graph, the shape of an image, and what Flatten nodes bring it to."""


def flatten(shape: Sequence[int], start: int = 0, end: int = -1) -> Any:
    node = nir.Flatten(input_type={"input": np.array(shape)}, start_dim=0, end_dim=-1)
    node.start_dim, node.end_dim = start, end
    return node


def dense_case(rng: np.random.Generator) -> Case:
    parts = {"a": affine(rng, 6, 8), "b": lif(rng, (8,)), "c": affine(rng, 8, 3), "d": integrate_and_fire(rng, (3,))}
    return chain((6,), (3,), **parts), (6,), {}


def readout_case(rng: np.random.Generator) -> Case:
    li = nir.LI(tau=rng.uniform(1, 6, 3) * DT, r=rng.uniform(1, 2, 3), v_leak=rng.normal(0, 1, 3))
    parts = {"a": nir.Linear(weight=rng.normal(0, 1, (8, 6))), "b": lif(rng, (8,)), "c": affine(rng, 8, 3), "d": li}
    return chain((6,), (3,), **parts), (6,), {}


def integrator_case(rng: np.random.Generator) -> Case:
    parts = {"a": nir.I(r=rng.uniform(200, 2000, 6)), "b": integrate_and_fire(rng, (6,)), "c": affine(rng, 6, 2)}
    return chain((6,), (2,), **parts), (6,), {}


def conv_case(rng: np.random.Generator) -> Case:
    parts = {
        "a": conv(rng, (8, 8), 2, 4, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        "b": lif(rng, (4, 4, 8)),
        "c": conv(rng, (4, 8), 4, 4, groups=2, padding="same"),
        "d": pool("SumPool2d", (2, 4), (1, 4)),
        "e": integrate_and_fire(rng, (4, 3, 2)),
        "f": flatten((4, 3, 2)),
        "g": affine(rng, 24, 3),
    }
    return chain((2, 8, 8), (3,), **parts), (2, 8, 8), {"f": (24,)}


def pool_case(rng: np.random.Generator) -> Case:
    parts = {
        "a": conv(rng, (8, 8), 1, 3, padding="valid"),
        "b": nir.Scale(scale=rng.uniform(0.5, 2, (3, 6, 6))),
        "c": lif(rng, (3, 6, 6)),
        "d": pool("AvgPool2d", 3, 2, (1, 1)),
        "e": flatten((3, 3, 3), start=1),  # counts the batch
        "f": affine(rng, 27, 3),
    }
    return chain((1, 8, 8), (3,), **parts), (1, 8, 8), {"e": (27,)}


def flatten_case(rng: np.random.Generator) -> Case:
    """Flattening from the first dimension after the channels, which are kept, as NIR spells it."""
    parts = {
        "a": integrate_and_fire(rng, (2, 3, 4)),
        "b": flatten((2, 3, 4), start=1),
        "c": lif(rng, (2, 12)),
        "d": flatten((2, 12)),
        "e": affine(rng, 24, 3),
    }
    return chain((2, 3, 4), (3,), **parts), (2, 3, 4), {"b": (2, 12), "d": (24,)}


def conv1d_case(rng: np.random.Generator) -> Case:
    weight = rng.normal(0, 0.5, (4, 1, 3))
    node = nir.Conv1d(
        input_shape=10, weight=weight, stride=2, padding=2, dilation=2, groups=2, bias=rng.normal(0, 0.2, 4)
    )
    parts = {"a": node, "b": lif(rng, (4, 5)), "c": flatten((4, 5)), "d": affine(rng, 20, 3)}
    return chain((2, 10), (3,), **parts), (2, 10), {"c": (20,)}


def sum_case(rng: np.random.Generator) -> Case:
    """Three edges meet at a neuron, two at the output."""
    graph = chain(
        (4,), (4,), a=affine(rng, 4, 4), b=lif(rng, (4,)), c=affine(rng, 4, 4), d=integrate_and_fire(rng, (4,))
    )
    graph.edges += [("input", "d"), ("b", "d"), ("b", "output")]
    return graph, (4,), {}


def scalar_case(rng: np.random.Generator) -> Case:
    """One number for all neurons, as some writers have it."""
    numbers = {"tau": 2.5 * DT, "r": 1.5, "v_leak": 0.1, "v_threshold": 0.6, "v_reset": -0.1}
    one = nir.LIF(**{name: np.float64(value) for name, value in numbers.items()})
    many = nir.IF(r=np.array([700.0]), v_threshold=np.array([0.4]), v_reset=np.array([0.0]))
    return chain((5,), (3,), a=affine(rng, 5, 7), b=one, c=affine(rng, 7, 3), d=many), (5,), {}


CASES: dict[str, Callable[[np.random.Generator], Case]] = {
    "dense": dense_case,
    "readout": readout_case,
    "integrator": integrator_case,
    "conv": conv_case,
    "pool": pool_case,
    "flatten": flatten_case,
    "conv1d": conv1d_case,
    "sum": sum_case,
    "scalar": scalar_case,
}


def save(graph: Any, path: Path) -> Path:
    nir.write(path, graph)
    return path


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_graphs_of_others_run_as_nir_says(tmp_path_factory: pytest.TempPathFactory, name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph, shape, shapes = CASES[name](rng)
    images = rng.normal(0.3, 1, (3, *shape))
    expected, distance = simulate(graph, images, 5, DT, shapes)
    assume(distance > 1e-9)  # the order of operations rounds differently
    path = save(graph, tmp_path_factory.mktemp(name) / "a.nir")
    network = from_nir(path, dt=DT, dtype=torch.float64)
    found = network(torch.from_numpy(images), 5)
    # Five steps of float64, with sums over at most 27 values of order 1.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-11)
    single = from_nir(path, dt=DT)
    assert all(value.dtype == torch.float32 for value in single.state_dict().values())
    # Streaming gives the same.
    logits, state = network(torch.from_numpy(images), 2, return_state=True)
    rest, _ = network(torch.from_numpy(images), 3, state=state, return_state=True)
    assert torch.equal(torch.cat((logits, rest)), found)


@pytest.mark.parametrize("name", CASES)
def test_graphs_of_others_fire(name: str) -> None:
    """What is compared above is not silence."""
    rng = np.random.default_rng(0)
    graph, shape, shapes = CASES[name](rng)
    expected, _ = simulate(graph, rng.normal(0.3, 1, (3, *shape)), 5, DT, shapes)
    assert len(np.unique(expected)) > 1


def test_lif_by_hand(tmp_path: Path) -> None:
    """tau = 4 ms in steps of 1 ms: v += (v_leak - v + r x) / 4, from v_leak = 0.25, reset to -0.5, above 1."""
    node = nir.LIF(
        tau=np.array([0.004]), r=np.array([2.0]), v_leak=np.array([0.25]), v_threshold=np.array([1.0]),
        v_reset=np.array([-0.5]),
    )  # fmt: skip
    network = from_nir(save(chain((1,), (1,), lif=node), tmp_path / "a.nir"), dt=1e-3)
    images = torch.tensor([1.0, 0.5, 1.0, 1.25]).view(4, 1, 1)
    # 0.25 + 2/4 = 0.75; 0.75 - 0.5/4 + 1/4 = 0.875; 0.875 - 0.625/4 + 2/4 = 1.21875: spike;
    # -0.5 + 0.75/4 + 2.5/4 = 0.3125.
    logits, (state,) = network(images, return_state=True)
    assert logits.flatten().tolist() == [0, 0, 1, 0]
    assert state.v.item() == 0.3125


def test_if_and_sum_pooling_by_hand(tmp_path: Path) -> None:
    """r dt = 500 per second times 1 ms adds half the sum of each window; ties with the threshold are silent."""
    shape = (1, 1, 2)
    node = nir.IF(r=np.full(shape, 500.0), v_threshold=np.full(shape, 1.0), v_reset=np.full(shape, 0.0))
    graph = chain((1, 2, 4), shape, pool=pool("SumPool2d", (2, 2), (2, 2)), neuron=node)
    network = from_nir(save(graph, tmp_path / "a.nir"), dt=1e-3)
    image = torch.tensor([[0.5, 0.0, 1.0, 1.0], [0.5, 0.0, 0.0, 0.5]]).view(1, 1, 2, 4)
    # Sums 1 and 2.5: potentials 0.5, 1 (tie), 1.5 and 1.25.
    assert network(image, 3).flatten(1).tolist() == [[0, 1], [0, 1], [1, 1]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dt", [1e-3, 1e-4, 3e-4, 7e-5])
@pytest.mark.parametrize("steps", [1, 2, 4, 64])
def test_units_survive_rounding(tmp_path: Path, dtype: type, dt: float, steps: int) -> None:
    """tau = 2 dt is two steps exactly, r = 1 / dt adds the input exactly, and tau = dt is not below dt."""
    ones = np.ones(2, dtype)
    graph = chain(
        (2,), (2,),
        a=nir.LIF(tau=dtype(steps * dt) * ones, r=ones, v_leak=0 * ones, v_threshold=ones, v_reset=0 * ones),
        b=nir.IF(r=dtype(1 / dt) * ones, v_threshold=ones, v_reset=0 * ones),
    )  # fmt: skip
    network = from_nir(save(graph, tmp_path / "a.nir"), dt=dt)
    first, second = network.sites.values()
    assert isinstance(first, AffineIF)
    assert isinstance(second, AffineIF)
    assert first.tau.tolist() == [steps, steps]
    assert second.r.tolist() == [1, 1]
    assert first.tau.dtype == second.r.dtype == torch.float32


def test_a_time_constant_that_rounds_below_a_step_is_one_step(tmp_path: Path) -> None:
    node = lif(np.random.default_rng(0), (2,))
    node.tau = np.array([1 - 1e-7, 1 + 1e-7]) * DT  # some tools compute in float32
    (neuron,) = from_nir(save(chain((2,), (2,), a=node), tmp_path / "a.nir"), dt=DT, dtype=torch.float64).sites.values()
    assert isinstance(neuron, AffineIF)
    assert neuron.tau.tolist() == [1, pytest.approx(1 + 1e-7, rel=1e-12)]


def test_numbers_for_all_neurons_are_one_number(tmp_path: Path) -> None:
    graph, _, _ = scalar_case(np.random.default_rng(0))
    network = from_nir(save(graph, tmp_path / "a.nir"), dt=DT)
    assert [tuple(neuron.v_threshold.shape) for neuron in network.sites.values()] == [(), ()]  # type: ignore[union-attr]


def test_weights_are_read_in_the_precision_asked_for(tmp_path: Path) -> None:
    """numpy makes float64 by default; images are float32."""
    graph, _, _ = dense_case(np.random.default_rng(0))
    path = save(graph, tmp_path / "a.nir")
    assert from_nir(path, dt=DT)(torch.rand(2, 6), 3).dtype == torch.float32
    assert from_nir(path, dt=DT, dtype=torch.float64)(torch.rand(2, 6, dtype=torch.float64), 3).dtype == torch.float64
    integers = chain((2,), (2,), a=nir.Linear(weight=np.array([[1, 2], [3, 4]])), b=lif(np.random.default_rng(0), (2,)))
    assert from_nir(save(integers, path), dt=DT)(torch.rand(3, 2), 2).dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["forward", "training", "meta", "lambda", "a.b", "1", "_x", "images", "steps", "carry"]
)
def test_names_of_all_kinds(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    graph = chain((4,), (3,), **{f"{name}_x": affine(rng, 4, 4), name: lif(rng, (4,)), f"{name}.": affine(rng, 4, 3)})
    images = rng.normal(0.3, 1, (3, 4))
    network = from_nir(save(graph, tmp_path / "a.nir"), dt=DT, dtype=torch.float64)
    np.testing.assert_allclose(network(torch.from_numpy(images), 4), simulate(graph, images, 4, DT)[0], atol=1e-12)


def test_reading_leaves_randomness_alone(tmp_path: Path) -> None:
    graph, _, _ = conv_case(np.random.default_rng(0))
    path = save(graph, tmp_path / "a.nir")
    before = torch.get_rng_state()
    from_nir(path, dt=DT)
    assert torch.equal(torch.get_rng_state(), before)


# Graphs of peers


def strengthened(model: nn.Module) -> None:
    """Weights three times as large as torch starts with, so that all layers fire."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.mul_(3)


@pytest.fixture(scope="module")
def sj() -> Any:
    """SpikingJelly's neurons, layers and exchange with NIR."""
    base = "spikingjelly.activation_based"
    reason = "needs spikingjelly: pip install --no-deps -r peers.txt"
    parts = [pytest.importorskip(f"{base}.{name}", reason=reason) for name in ("neuron", "layer", "nir_exchange")]
    pytest.importorskip("nirtorch", reason="needs nirtorch: pip install nirtorch")
    return parts


def test_graphs_of_spikingjelly(tmp_path: Path, sj: Any) -> None:
    """Every step of every spike, with hard resets elsewhere than at 0, and inputs that are not divided by tau."""
    neuron, layer_of, exchange = sj
    torch.manual_seed(0)
    model = nn.Sequential(
        layer_of.Conv2d(2, 6, 3, padding=1),
        neuron.LIFNode(tau=2.0, v_threshold=0.5, v_reset=0.0),
        layer_of.AvgPool2d(2),
        layer_of.Conv2d(6, 6, 3, stride=2, bias=False),
        neuron.LIFNode(tau=3.0, v_threshold=0.4, v_reset=-0.2, decay_input=False),
        layer_of.Flatten(),
        layer_of.Linear(6, 8),
        neuron.ParametricLIFNode(init_tau=2.5, v_threshold=0.3, v_reset=0.0),
        layer_of.Linear(8, 3),
        neuron.IFNode(v_threshold=0.7, v_reset=-0.1),
    )
    strengthened(model)
    images = 2 * torch.randn(16, 2, 8, 8)
    exchange.export_to_nir(model, images, tmp_path / "a.nir", dt=1e-4)
    for module in model:
        if hasattr(module, "reset"):
            module.reset()
    expected = torch.stack([model(images) for _ in range(6)])
    assert 0.1 < expected.mean() < 0.9
    assert torch.equal(from_nir(tmp_path / "a.nir", dt=1e-4)(images, 6), expected)


def test_graphs_of_snntorch(tmp_path: Path) -> None:
    """dt is 0.1 ms in all of its files. Neurons must have numbers for each, or its exporter stops."""
    snn = pytest.importorskip("snntorch", reason="needs snntorch: pip install snntorch")
    exporter = pytest.importorskip("snntorch.export_nir", reason="needs nirtorch: pip install nirtorch")
    torch.manual_seed(0)

    def leaky(size: int, beta: float, threshold: float, **settings: Any) -> nn.Module:
        numbers = {"beta": torch.full((size,), beta), "threshold": torch.full((size,), threshold)}
        return snn.Leaky(**numbers, reset_mechanism="zero", init_hidden=True, **settings)

    model = nn.Sequential(
        nn.Linear(12, 20), leaky(20, 0.75, 1.0), nn.Linear(20, 3, bias=False), leaky(3, 0.5, 0.8, output=True)
    )
    strengthened(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # nirtorch of its own interface, which snntorch uses
        graph = exporter.export_to_nir(model, torch.randn(12))
    nir.write(tmp_path / "a.nir", graph)
    images = 2 * torch.randn(16, 12)
    for module in (model[1], model[3]):
        module.reset_mem()
    expected = torch.stack([model(images)[0] for _ in range(6)])
    assert 0.05 < expected.mean() < 0.95
    assert torch.equal(from_nir(tmp_path / "a.nir", dt=1e-4)(images, 6), expected)


def test_graphs_of_sinabs(tmp_path: Path) -> None:
    """Its steps are the unit of time, r = 1. It subtracts at a reset, which its files do not say: one step is the same,
    at currents below two thresholds, since it may also send several spikes at once."""
    sl = pytest.importorskip("sinabs.layers", reason="needs sinabs: pip install --no-deps -r peers.txt")
    exchange = pytest.importorskip("sinabs.nir", reason="needs nirtorch: pip install nirtorch")
    torch.manual_seed(0)
    thresholds = (1.0, 4.0, 1.0)
    first, second, third = (sl.IAFSqueeze(batch_size=16, spike_threshold=threshold) for threshold in thresholds)
    layers = (nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, groups=2), nn.Linear(16, 3))
    for module in layers:
        module.weight.abs_()
    model = nn.Sequential(layers[0], first, sl.SumPool2d(2), layers[1], second, nn.Flatten(), layers[2], third)
    images = torch.rand(16, 2, 8, 8)
    expected = model(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # nirtorch of its own interface, which sinabs uses
        graph = exchange.to_nir(model, images)
    graph.infer_types()  # without which h5py cannot write what sinabs leaves open
    nir.write(tmp_path / "a.nir", graph)
    network = from_nir(tmp_path / "a.nir", dt=1.0)
    assert 0.1 < expected.mean() < 0.9
    assert torch.equal(network(images, 1)[0], expected)


# Files of ours


def ours(tmp_path: Path, neuron: Any, **settings: Any) -> tuple[models.Network, Path]:
    torch.manual_seed(0)
    model = models.mlp([4, 16, 8, 3], neuron=neuron).eval()
    to_nir(model, tmp_path / "a.nir", **settings)
    return model, tmp_path / "a.nir"


@pytest.mark.parametrize(
    ("neuron", "kind", "numbers"),
    [
        (partial(LIF, tau=3.7, v_threshold=0.3, reset="soft"), LIF, {"tau": 3.7, "v_threshold": 0.3, "reset": "soft"}),
        (partial(IF, v_threshold=0.3), IF, {"v_threshold": 0.3, "reset": "hard"}),
        (partial(PLIF, tau=1.7, reset="soft"), PLIF, {"v_threshold": 0.5, "reset": "soft"}),
        (partial(LIFB, tau=3.0, v_threshold=0.7), LIFPair, {"tau": 3.0, "v_threshold": 0.7, "coupled": True}),
    ],
    ids=["LIF", "IF", "PLIF", "LIFB"],
)
@pytest.mark.parametrize("dt", [1e-3, 3e-4])
def test_neurons_of_ours_come_back(tmp_path: Path, neuron: Any, kind: type, numbers: dict[str, Any], dt: float) -> None:
    model, path = ours(tmp_path, neuron, dt=dt)
    network = from_nir(path)
    assert [type(found) for found in network.sites.values()] == [kind] * 2
    for found, written in zip(network.sites.values(), (model.body.layers[0], model.body.layers[2]), strict=True):
        assert {name: getattr(found.params, name) for name in numbers} == numbers
        if isinstance(found, PLIF):
            assert torch.equal(found.decay, written.neuron.decay)


def test_converted_neurons_come_back(tmp_path: Path) -> None:
    snn, images = build("converted-signed")
    to_nir(snn, tmp_path / "a.nir", images=images)
    network = from_nir(tmp_path / "a.nir")
    for found, written in zip(network.sites.values(), snn.sites.values(), strict=True):
        assert isinstance(found, ConvertedIF)
        assert found.signed
        assert found.binary
        for name, value in written.state_dict().items():
            assert torch.equal(getattr(found, name), value)
    with pytest.raises(ValueError, match="step 4 was asked for, but the biases were calibrated for steps 1 to 3"):
        network(images, 4)


@pytest.mark.parametrize("shape", [(5, 4), (5, 1, 2, 2), (3, 5, 4), (3, 5, 1, 2, 2)])
@pytest.mark.parametrize("written_with", [None, (2, 4), (2, 1, 2, 2)])
def test_networks_on_vectors_take_images_too(
    tmp_path: Path, shape: tuple[int, ...], written_with: tuple[int, ...] | None
) -> None:
    images = None if written_with is None else torch.rand(written_with)
    model, path = ours(tmp_path, LIF, images=images)
    network = from_nir(path)
    assert network.frame_dims == (2, 4)
    x = torch.rand(shape)
    steps = 3 if len(shape) in (2, 4) else None
    torch.testing.assert_close(network(x, steps), model(x, steps))


def test_without_metadata_it_is_what_others_see(tmp_path: Path) -> None:
    """Ties are silent, resets hard, and pairs unconnected."""
    _, path = ours(tmp_path, partial(LIFB, tau=3.0, v_threshold=0.7, reset="soft"))
    network = from_nir(path, use_metadata=False)
    assert [type(neuron) for neuron in network.sites.values()] == [AffineIF] * 4
    for neuron in network.sites.values():
        assert isinstance(neuron, AffineIF)
        assert (neuron.params.reset, neuron.params.ties_fire, neuron.params.leaky) == ("hard", False, True)
        assert neuron.tau.unique().tolist() == [3.0]
    assert {round(float(neuron.v_threshold[0]), 3) for neuron in network.sites.values()} == {0.7, 1.4}  # type: ignore[union-attr]


def test_another_dt_is_another_network(tmp_path: Path) -> None:
    """At half the step tau is twice as many."""
    _, path = ours(tmp_path, LIF, dt=1e-3)
    network = from_nir(path, dt=5e-4)
    for neuron in network.sites.values():
        assert isinstance(neuron, AffineIF)
        assert neuron.tau.unique().tolist() == [4.0]
        assert neuron.params.ties_fire


def changed(path: Path, change: Callable[[Any], None]) -> Path:
    """The file after another tool read, changed and wrote it."""
    graph = nir.read(path)
    change(graph)
    nir.write(path, graph)
    return path


@pytest.mark.parametrize(
    ("attribute", "value", "expected"),
    [
        ("tau", 0.005, 5.0),
        ("r", 3.0, 3.0),
        ("v_leak", 0.25, 0.25),
        ("v_threshold", 0.75, 0.75),
        ("v_reset", -1.0, -1.0),
    ],
)
def test_changed_numbers_count_and_not_the_metadata(
    tmp_path: Path, attribute: str, value: float, expected: float
) -> None:
    _, path = ours(tmp_path, partial(LIF, reset="soft"))

    def change(graph: Any) -> None:
        getattr(graph.nodes["body_0"], attribute)[3] = value

    first, second = from_nir(changed(path, change)).sites.values()
    assert isinstance(first, AffineIF)
    assert getattr(first, attribute)[3].item() == pytest.approx(expected)
    assert first.params.ties_fire  # these still hold
    assert first.params.reset == "soft"
    assert isinstance(second, LIF)


def test_changed_burst_thresholds_are_two_neurons(tmp_path: Path) -> None:
    _, path = ours(tmp_path, LIFB)

    def change(graph: Any) -> None:
        graph.nodes["body_0_burst"].v_threshold[:] = 0.9

    sites = from_nir(changed(path, change)).sites
    assert {name: type(neuron) for name, neuron in sites.items()} == {
        "body_0": LIF, "body_0_burst": AffineIF, "body_2": LIFPair,
    }  # fmt: skip


def test_neurons_on_other_inputs_are_no_pair(tmp_path: Path) -> None:
    _, path = ours(tmp_path, LIFB)

    def change(graph: Any) -> None:
        graph.nodes["more"] = nir.Scale(scale=np.full(16, 2.0))
        graph.edges.remove(("encoder_1", "body_0_burst"))
        graph.edges += [("encoder_1", "more"), ("more", "body_0_burst")]

    sites = from_nir(changed(path, change)).sites
    assert {name: type(neuron) for name, neuron in sites.items()} == {
        "body_0": LIF, "body_0_burst": LIF, "body_2": LIFPair,
    }  # fmt: skip


def test_changed_thresholds_of_converted_neurons_are_read_for_each(tmp_path: Path) -> None:
    snn, images = build("converted")
    to_nir(snn, tmp_path / "a.nir", images=images)

    def change(graph: Any) -> None:
        node = next(node for node in graph.nodes.values() if type(node).__name__ == "IF" and node.r.shape == (4, 8, 8))
        node.v_threshold[0, 0, 0] *= 2

    first, second = from_nir(changed(tmp_path / "a.nir", change)).sites.values()
    assert isinstance(first, AffineIF)
    assert isinstance(second, ConvertedIF)


def test_files_of_newer_versions_are_refused(tmp_path: Path) -> None:
    _, path = ours(tmp_path, LIF)

    def change(graph: Any) -> None:
        graph.metadata["ranvier_format"] = 2

    with pytest.raises(ValueError, match=r"a\.nir is of layout 2, but this version of ranvier knows 1\. Update"):
        from_nir(changed(path, change))


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"ranvier_neuron": "Spiky"}, r"node body_0 \(LIF\) holds something else than expected \(KeyError"),
        ({"ranvier_neuron": "LIF"}, "KeyError: 'ranvier_v_threshold'"),
        ({"ranvier_neuron": "LIF", "ranvier_v_threshold": "high"}, "could not convert string to float: 'high'"),
        ({"ranvier_neuron": "PLIF", "ranvier_v_threshold": 0.5, "ranvier_decay": np.zeros(3)}, "TypeError"),
        ({"ranvier_reset": "rough"}, "reset is 'rough'"),
        ({"ranvier_ties_fire": np.zeros(2)}, "truth value"),
        ({"dt": "soon"}, "could not convert string to float: 'soon'"),
        ({"dt": -1.0}, "dt is -1.0, but a step takes more than 0 seconds"),
        ({"frame_dims": "four"}, "the file holds something else than expected"),
        ({"frame_dims": 2.5}, "the file holds something else than expected"),
        ({"frame_dims": np.array([7])}, r"images of 1 dimensions, but says that batches have \(7,\)"),
        ({"ranvier_format": "one"}, "the file holds something else than expected"),
        # Of another kind than the node: then the node counts.
        ({"ranvier_neuron": "ConvertedIF"}, None),
        ({"ranvier_neuron": "IF", "ranvier_v_threshold": 0.5}, None),
        ({"dtype": "int8"}, None),
    ],
)
def test_broken_metadata(tmp_path: Path, metadata: dict[str, Any], match: str | None) -> None:
    _, path = ours(tmp_path, LIF)

    def change(graph: Any) -> None:
        node = graph.nodes["body_0"]
        if any(name.startswith("ranvier_") and name != "ranvier_format" for name in metadata):
            node.metadata = metadata
        else:
            graph.metadata |= metadata

    changed(path, change)
    if match is None:
        assert from_nir(path)(torch.rand(2, 4), 2).shape == (2, 2, 3)
        return
    with pytest.raises(ValueError, match=match):
        from_nir(path)


# What cannot be read


def simple(**parts: Any) -> Any:
    rng = np.random.default_rng(0)
    return chain((4,), (3,), **({"a": affine(rng, 4, 3), "b": lif(rng, (3,))} | parts))


def cuba(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.full(shape, 0.01) for name in ("tau_syn", "tau_mem", "r", "v_leak")}


def looped() -> Any:
    rng = np.random.default_rng(0)
    graph = simple(c=affine(rng, 3, 3))
    graph.edges += [("c", "b")]
    return graph


def edited(change: Callable[[Any], None]) -> Any:
    graph = simple()
    change(graph)
    return graph


UNREADABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "CubaLIF": (
        lambda: simple(c=nir.CubaLIF(**cuba((3,)), v_threshold=np.ones(3), v_reset=np.zeros(3))),
        r"cannot be read: node c is a CubaLIF, which is not known here\. Known are Input, .*Flatten",
    ),
    "CubaLI": (lambda: simple(c=nir.CubaLI(**cuba((3,)))), "node c is a CubaLI"),
    "Delay": (lambda: simple(c=nir.Delay(delay=np.ones(3))), "node c is a Delay"),
    "Threshold": (lambda: simple(c=nir.Threshold(threshold=np.ones(3))), "node c is a Threshold"),
    "nested": (lambda: simple(c=simple()), "node c is a graph inside the graph"),
    "recurrent": (looped, r"is recurrent: (b -> c -> b|c -> b -> c)\. Networks without feedback can be read"),
    "self-loop": (lambda: edited(lambda graph: graph.edges.append(("b", "b"))), r"is recurrent: b -> b\."),
    "no input": (lambda: edited(lambda graph: graph.nodes.pop("input")), "edge input -> a, but no node input"),
    "no output": (
        lambda: edited(lambda graph: (graph.nodes.pop("output"), graph.edges.pop())),
        "has 0 nodes of kind Output, but must have one",
    ),
    "two inputs": (
        lambda: edited(lambda graph: graph.nodes.update(x=nir.Input(input_type={"input": np.array([3])}))),
        "has 2 nodes of kind Input",
    ),
    "hanging": (
        lambda: edited(lambda graph: (graph.edges.remove(("input", "a")), graph.edges.append(("input", "b")))),
        r"has a node a \(Affine\) without input",
    ),
    "no neurons": (
        lambda: chain((4,), (3,), a=affine(np.random.default_rng(0), 4, 3)),
        "has no neurons that reach its output, so it is no spiking network",
    ),
    "side neuron": (
        lambda: edited(lambda graph: (graph.edges.remove(("b", "output")), graph.edges.append(("a", "output")))),
        "no neurons that reach its output",
    ),
    "width": (
        lambda: simple(a=affine(np.random.default_rng(0), 5, 3)),
        r"node a \(Affine\) holds something else than expected \(RuntimeError: .*0x4 and 5x3",
    ),
    "neurons": (
        lambda: simple(b=lif(np.random.default_rng(0), (4,))),
        r"node b \(LIF\) has tau of shape \[4\], but its input is \[3\]",
    ),
    "broadcast": (
        lambda: chain((2, 3), (2, 3), b=lif(np.random.default_rng(0), (3,))),
        r"node b \(LIF\) has tau of shape \[3\], but its input is \[2, 3\]",
    ),
    "scale": (
        lambda: simple(c=nir.Scale(scale=np.ones(4))),
        r"node c \(Scale\) has scale of shape \[4\], but its input is \[3\]",
    ),
    "sum": (
        lambda: edited(lambda graph: graph.edges.append(("input", "b"))),
        r"node b \(LIF\) gets inputs of shapes \[3\] and \[4\]",
    ),
    "time constant": (
        lambda: edited(lambda graph: graph.nodes["b"].tau.fill(5e-4)),
        r"node b \(LIF\) has a time constant of 0\.0005 s, below dt = 0\.001 s.*smaller dt",
    ),
    "no number": (lambda: edited(lambda graph: graph.nodes["b"].tau.fill(np.nan)), "time constant of nan"),
    "kernel": (
        lambda: chain(
            (1, 2, 2),
            (1,),
            c=conv(np.random.default_rng(0), (2, 2), 1, 1, padding=(0, 0)),
            d=lif(np.random.default_rng(0), (1,)),
        ),
        r"node c \(Conv2d\) holds something else than expected",
    ),
    "channels": (
        lambda: chain((2, 4, 4), (1,), c=conv(np.random.default_rng(0), (4, 4), 3, 1)),
        r"node c \(Conv2d\) holds something else",
    ),
    "stride": (
        lambda: chain((1, 4, 4), (1,), c=pool("AvgPool2d", 2, 0)),
        r"node c \(AvgPool2d\) holds something else",
    ),
    "weights": (
        lambda: simple(a=nir.Affine(weight=np.ones((2, 3, 4)), bias=np.ones(3))),
        r"node a \(Affine\) holds something else",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    build_graph, match = UNREADABLE[name]
    path = save(build_graph(), tmp_path / "a.nir")
    with pytest.raises(ValueError, match=match) as caught:
        from_nir(path, dt=DT)
    assert str(path) in str(caught.value)


def test_files_of_others_need_dt(tmp_path: Path) -> None:
    path = save(simple(), tmp_path / "a.nir")
    with pytest.raises(ValueError, match=r"a\.nir does not say how long a step is\. Pass dt, in seconds: dt=1e-3"):
        from_nir(path)


@pytest.mark.parametrize("dt", [0.0, -1e-3, float("nan"), float("inf")])
def test_steps_take_some_time(tmp_path: Path, dt: float) -> None:
    path = save(simple(), tmp_path / "a.nir")
    with pytest.raises(ValueError, match=f"dt is {dt}, but a step takes more than 0 seconds"):
        from_nir(path, dt=dt)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "none.nir", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(FileNotFoundError, match=f"{path} {what}"):
            from_nir(path)


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.nir"
    for content in (b"", b"no HDF5", b"\x89HDF\r\n\x1a\n" + bytes(100), b"\x80\x04\x95" + bytes(40)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.nir could not be read as a NIR graph \(OSError"):
            from_nir(path)
    with h5py.File(path, "w") as file:
        file["weights"] = np.ones(3)
    with pytest.raises(ValueError, match=r"a\.nir could not be read as a NIR graph \(KeyError"):
        from_nir(path)
    nir.write(path, lif(np.random.default_rng(0), (3,)))  # no graph
    with pytest.raises(ValueError, match=r"a\.nir could not be read as a NIR graph"):
        from_nir(path)


def test_without_nir_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(ImportError, match=r"pip install 'ranvier\[export\]'"):
        from_nir(tmp_path / "a.nir")
    with pytest.raises(ImportError, match=r"pip install 'ranvier\[export\]'"):
        to_nir(models.mlp([2, 3, 2]), tmp_path / "a.nir")
    assert not list(tmp_path.iterdir())


# Damage


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("intact") / "a.nir"
    torch.manual_seed(0)
    to_nir(models.mlp([4, 8, 3], neuron=LIFB), path)
    return path.read_bytes()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.01, 0.3, 0.7, 0.9, 0.99, None])
def test_truncated_files(tmp_path: Path, intact: bytes, kept: float | None) -> None:
    path = tmp_path / "a.nir"
    last = intact.rindex(b"\nranvier sha256 ") - 1  # all but one byte, and the checksum
    path.write_bytes(intact[: last if kept is None else int(kept * len(intact))])
    with pytest.raises(ValueError, match=r"a\.nir could not be read as a NIR graph .*truncated"):
        from_nir(path)


def test_a_single_changed_byte_is_told(tmp_path: Path, intact: bytes) -> None:
    """Of a hundred places, also where HDF5 would hang or read other numbers; and in the checksum itself."""
    path = tmp_path / "a.nir"
    rng = random.Random(0)
    seal = intact.rindex(b"\nranvier sha256 ")
    for place in [*rng.sample(range(seal), 100), len(intact) - 60, len(intact) - 2]:
        content = bytearray(intact)
        content[place] ^= rng.randrange(1, 256)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.nir is damaged: its checksum is not that of its content"):
            from_nir(path)


def test_files_with_noise_in_them_are_an_error_or_whole(tmp_path: Path, intact: bytes) -> None:
    """Several bytes changed, and cut: nothing but ValueError, and no other network."""
    path = tmp_path / "a.nir"
    path.write_bytes(intact)
    expected = from_nir(path).state_dict()
    rng = random.Random(1)
    for _ in range(100):
        content = bytearray(intact)
        for _ in range(rng.choice((1, 2, 8))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            found = from_nir(path)
        except ValueError as error:
            assert "a.nir" in str(error)  # noqa: PT017
            continue
        assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_the_checksum_is_no_matter_to_others(tmp_path: Path, intact: bytes) -> None:
    """NIR reads the file as it is; a tool that changes it in place cuts the checksum off, and ours reads it then."""
    path = tmp_path / "a.nir"
    path.write_bytes(intact)
    assert isinstance(nir.read(path), nir.NIRGraph)
    assert b"ranvier sha256" in intact[-100:]
    shutil.copy(path, tmp_path / "copy.nir")
    with h5py.File(tmp_path / "copy.nir", "r+") as file:
        file["node/nodes/body_0/v_threshold"][...] = 0.75
    assert b"ranvier sha256" not in (tmp_path / "copy.nir").read_bytes()[-100:]
    network = from_nir(tmp_path / "copy.nir")
    assert isinstance(network, GraphSNN)
    assert isinstance(network.sites["body_0"], AffineIF)


@pytest.mark.parametrize("name", ["resnet20", "decoupled", "converted"])
def test_a_network_that_was_read_can_be_kept(name: str, tmp_path: Path) -> None:
    """As safetensors, with its neurons: the same network comes back."""
    model, images = build(name)
    to_nir(model, tmp_path / "a.nir", images=images)
    for use_metadata in (True, False):
        network = from_nir(tmp_path / "a.nir", use_metadata=use_metadata)
        conversion.save(network, tmp_path / "a.safetensors")
        loaded = conversion.load(tmp_path / "a.safetensors")
        assert torch.equal(loaded(images, 3), network(images, 3))
        assert (loaded.frame_dims, loaded.image_size) == (network.frame_dims, network.image_size)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    """Average pooling of all places is written for one size: on 12 x 12 places it would leave some out."""
    model, images = build("resnet20")
    to_nir(model, tmp_path / "a.nir", images=images)
    network = from_nir(tmp_path / "a.nir")
    model(torch.rand(2, 2, 12, 12), 1)
    with pytest.raises(ValueError, match="12x12 pixels, but this network was built for 8x8"):
        network(torch.rand(2, 2, 12, 12), 1)
    wide = torch.rand(2, 2, 8, 12)
    to_nir(model, tmp_path / "a.nir", images=wide)
    network = from_nir(tmp_path / "a.nir")
    assert network.image_size == (8, 12)
    torch.testing.assert_close(network(wide, 1), model(wide, 1))
    with pytest.raises(ValueError, match="8x8 pixels, but this network was built for 8x12"):
        network(images, 1)
    vector, x = build("mlp-lif")
    to_nir(vector, tmp_path / "a.nir", images=x)
    assert from_nir(tmp_path / "a.nir").image_size is None


@pytest.mark.parametrize(("padding", "places"), [("same", 10), ("valid", 6), (2, 12)])
def test_operations_of_padding_by_name(tmp_path: Path, padding: Any, places: int) -> None:
    """Three taps over four places reach 3 * 4 - 2 of them with one place of padding at either end."""
    conv = {"stride": 1, "dilation": 1, "groups": 1, "weight": np.ones((2, 1, 3), np.float32), "bias": np.zeros(2)}
    length = {"same": 4, "valid": 2, 2: 6}[padding]
    nodes = [
        nir.Input(input_type={"input": np.array([1, 4])}),
        nir.Conv1d(input_shape=4, padding=padding, **conv),
        nir.IF(r=np.full((2, length), 1 / DT), v_threshold=np.ones((2, length)), v_reset=np.zeros((2, length))),
        nir.Flatten(input_type={"input": np.array([2, length])}, start_dim=0, end_dim=-1),
        nir.Linear(weight=np.ones((3, 2 * length), np.float32)),
        nir.Output(output_type={"output": np.array([3])}),
    ]
    nir.write(tmp_path / "a.nir", nir.NIRGraph.from_list(*nodes))
    network = from_nir(tmp_path / "a.nir", dt=DT)
    found = count_operations(network, [(torch.rand(2, 1, 4), torch.zeros(2))], 2)
    assert found.layers[0].ann == 2 * places
    assert decouple(network, torch.rand(2, 1, 4)).report.before.synapses == 2 * places + 3 * 2 * length
