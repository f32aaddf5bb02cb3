"""Converted networks on disk: the same network comes back, and other files say why not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ranvier import models, weights
from ranvier.conversion import (
    ConvertedSNN,
    DecoupledSNN,
    GraphSNN,
    Settings,
    convert,
    decouple,
    load,
    save,
    trace_network,
)
from ranvier.conversion.storage import from_card
from ranvier.dynamics import ATan
from ranvier.nn import IF, LIF, LIFB, PLIF, QCFS, AffineIF, BatchNorm, Neuron

from .dyadic import NETS, exact, images, twins

STEPS = 3


class Net(nn.Module):
    """Without biases; a shift and a factor of constants, a shortcut, and what `fold_batchnorm` leaves."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, bias=False)
        self.down = nn.Conv2d(4, 4, 1, stride=2, bias=False)
        self.head = nn.Linear(4 * 9, 3, bias=False)
        self.acts = nn.ModuleList(activation() for _ in range(2))
        self.register_buffer("mean", torch.rand(1, 1, 1))
        self.register_buffer("gain", torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.acts[0](self.norm(self.enter(x - self.mean)) * self.gain)
        return self.head(self.acts[1](self.conv(x) + self.down(x)).flatten(1))


def converted(**arguments: Any) -> ConvertedSNN:
    torch.manual_seed(0)
    ann = Net(QCFS if arguments.get("threshold") == "qcfs" else nn.ReLU).eval()
    settings = Settings(rounds=(0, 2), batch_size=20, v_init=0.25)
    return convert(ann, torch.rand(60, 1, 6, 6), **{"steps": STEPS, "settings": settings, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"bias": "none"},
        {"bias": "light", "signed": True},
        {"bias": "potential"},
        {"bias": "ftbc", "threshold": "max", "signed": True},
        {"bias": "ftbc", "threshold": "qcfs", "steps": 1},
        {"bias": "auto", "threshold": "auto", "refit": True},
    ],
    ids=str,
)
def test_the_same_comes_back(arguments: dict[str, Any], tmp_path: Path) -> None:
    snn = converted(**arguments)
    save(snn, tmp_path / "snn.safetensors")
    loaded = load(tmp_path / "snn.safetensors")
    x = torch.rand(7, 1, 6, 6)
    assert torch.equal(loaded(x, snn.steps), snn(x, snn.steps))
    assert loaded.report == snn.report
    assert (loaded.steps, loaded.frame_dims) == (snn.steps, snn.frame_dims)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    before, after = snn.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert list(loaded.neurons) == list(snn.neurons)
    for neuron, expected in zip(loaded.neurons.values(), snn.neurons.values(), strict=True):
        assert neuron.signed is expected.signed is arguments.get("signed", False)
    first, state = loaded(x, 1, return_state=True)
    assert torch.equal(first, snn(x, 1))
    assert len(state) == 2


def test_kinds_of_neurons_are_among_those() -> None:
    """What the test above is to cover: without this it might not."""
    assert [list(neuron.v_init.shape) for neuron in converted(bias="potential").neurons.values()] == [
        [4, 6, 6],
        [4, 3, 3],
    ]
    steps = Settings(rounds=(1,))
    assert {len(neuron.bias) for neuron in converted(bias="ftbc", settings=steps).neurons.values()} == {STEPS}
    assert any("constant" in key for key in converted(bias="none").state_dict())


def test_a_fitted_bias_that_the_ann_does_not_have(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    x = torch.randn(600, 6)
    snn = convert(ann, x, steps=1, threshold="max", bias="none", refit=True)
    assert snn.report is not None
    assert snn.report.chosen.refit
    assert snn.network.get_submodule("2").bias.abs().max() > 0.01
    save(snn, tmp_path / "snn.safetensors")
    assert torch.equal(load(tmp_path / "snn.safetensors")(x, 1), snn(x, 1))


@pytest.mark.parametrize("name", NETS)
def test_every_graph(name: str, tmp_path: Path) -> None:
    """Constants, concatenations, shortcuts; built without `convert`, so without a report."""
    kind, shape = NETS[name]
    x = images(3, *shape)
    _, snn = twins(exact(kind()), x, signed=True)
    save(snn, tmp_path / "snn.safetensors")
    loaded = load(tmp_path / "snn.safetensors")
    assert torch.equal(loaded(x, 4), snn(x, 4))
    assert loaded.report is None
    save(loaded, tmp_path / "again.safetensors")
    assert torch.equal(load(tmp_path / "again.safetensors")(x, 4), snn(x, 4))


def test_float64(tmp_path: Path) -> None:
    """Tensors come back in the type that they had."""
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    x = torch.randn(60, 6).double()
    snn = convert(ann, x, steps=2, bias="light")
    save(snn, tmp_path / "snn.safetensors")
    logits = load(tmp_path / "snn.safetensors")(x, 2)
    assert logits.dtype == torch.float64
    assert torch.equal(logits, snn(x, 2))


def test_a_network_in_training(tmp_path: Path) -> None:
    """What is kept is what was trained, thresholds that an update drove below zero included."""
    snn = converted(bias="ftbc", threshold="max")
    x = torch.rand(7, 1, 6, 6)
    for neuron in snn.neurons.values():
        neuron.make_trainable(STEPS)
        with torch.no_grad():
            neuron.parametrizations["threshold"].original.sub_(0.25)
    assert min(float(p.detach().min()) for name, p in snn.named_parameters() if "threshold" in name) < 0
    expected = snn(x, STEPS).detach()
    assert (expected.std(1) > 0).all()
    save(snn, tmp_path / "snn.safetensors")
    assert torch.equal(snn(x, STEPS), expected), "the network is as it was"
    loaded = load(tmp_path / "snn.safetensors")
    assert torch.equal(loaded(x, STEPS), expected)
    assert set(loaded.state_dict()) == set(converted(bias="ftbc", threshold="max").state_dict())


@pytest.mark.parametrize("threshold", [0.0, -0.5, float("nan")])
def test_thresholds_that_are_not_above_zero(threshold: float, tmp_path: Path) -> None:
    snn = converted(bias="none")
    save(snn, tmp_path / "snn.safetensors")
    tensors, card = weights.load_tensors(tmp_path / "snn.safetensors")
    tensors["network.acts.0.neuron.threshold"][2] = threshold
    with pytest.raises(ValueError, match=r"acts\.0 of the file has a threshold of .* must be greater than 0"):
        from_card(tensors, card, "the file")
    snn.neurons["acts.0"].threshold[2] = threshold
    with pytest.raises(ValueError, match=r"acts\.0 of the network has a threshold of"):
        save(snn, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def mixed(neurons: Iterator[Neuron]) -> models.Network:
    """Kinds of neurons beside and behind one another, at random weights that make them fire."""
    torch.manual_seed(0)
    model = models.vgg(
        (4, "A", 6), num_classes=3, in_channels=1, image_size=6, neuron=lambda _: next(neurons), hidden=(8,)
    )
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 1, 6, 6), 2)
    return model.eval()


@pytest.mark.parametrize(
    "kinds",
    [
        (LIFB(4), LIF(tau=3.0, surrogate=ATan()), LIFB(8)),
        (IF(reset="soft"), PLIF(tau=1.5), AffineIF(v_leak=torch.linspace(0, 0.25, 8), v_reset=-0.25)),
    ],
    ids=["bursts", "plain"],
)
def test_decoupled_networks(kinds: tuple[Neuron, ...], tmp_path: Path) -> None:
    model, x = mixed(iter(kinds)), torch.rand(5, 1, 6, 6)
    pair = decouple(model, x, steps=STEPS)
    assert pair.report.events_after is not None
    assert pair.report.events_after > 10
    save(pair, tmp_path / "pair.safetensors")
    loaded = load(tmp_path / "pair.safetensors")
    assert isinstance(loaded, DecoupledSNN)
    assert torch.equal(loaded(x, STEPS), pair(x, STEPS))
    assert loaded.report == pair.report
    assert (loaded.frame_dims, loaded.image_size) == (pair.frame_dims, 6)
    assert [repr(site) for site in loaded.sites.values()] == [repr(site) for site in pair.sites.values()]
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = decouple(loaded, x, steps=STEPS)
    assert torch.equal(again(x, STEPS), pair(x, STEPS))
    with pytest.raises(ValueError, match="the file holds a decoupled network. Read it with ranvier.conversion.load"):
        from_card(*weights.load_tensors(tmp_path / "pair.safetensors"), "the file")


def test_readouts_that_forget(tmp_path: Path) -> None:
    """Of converted networks, of those made of them, and of files that were written before there were any."""
    snn, x = converted(bias="none"), torch.rand(7, 1, 6, 6)
    plain = snn(x, STEPS)
    snn.readout_decay = 0.25
    for number, each in enumerate((snn, decouple(snn, x), trace_network(snn, x).to_snn())):
        path = tmp_path / f"{number}.safetensors"
        save(each, path)
        loaded = load(path)
        assert type(loaded) is type(each)
        assert loaded.readout_decay == each.readout_decay == 0.25
        assert torch.equal(loaded(x, STEPS), each(x, STEPS))
        torch.testing.assert_close(each(x, STEPS), snn(x, STEPS), rtol=0, atol=1e-5)
        assert not torch.allclose(each(x, STEPS), plain, atol=1e-2)
        tensors, card = weights.load_tensors(path)
        weights.save_tensors(path, tensors, without(card, "readout_decay"))
        assert load(path).readout_decay == 1


def test_graphs_that_still_burst(tmp_path: Path) -> None:
    snn = trace_network(mixed(iter([LIFB(4), LIFB(6), LIFB(8)]))).to_snn()
    save(snn, tmp_path / "snn.safetensors")
    loaded, x = load(tmp_path / "snn.safetensors"), torch.rand(5, 1, 6, 6)
    assert type(loaded) is GraphSNN
    assert torch.equal(loaded(x, STEPS), snn(x, STEPS))


def test_decoupled_conversions(tmp_path: Path) -> None:
    """In float64, with biases for each step: what the card says of converted neurons is as before."""
    snn = converted(bias="ftbc", threshold="max", signed=True).double()
    x = torch.rand(7, 1, 6, 6).double()
    pair = decouple(snn, x)
    save(pair, tmp_path / "pair.safetensors")
    loaded = load(tmp_path / "pair.safetensors")
    assert torch.equal(loaded(x, STEPS), pair(x, STEPS))
    assert loaded(x, STEPS).dtype == torch.float64


def test_what_is_no_graph(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="snn is a Linear, but must be what convert, decouple.*ranvier.weights.save"):
        save(nn.Linear(2, 2), tmp_path / "snn.safetensors")  # type: ignore[arg-type]

    class Own(LIF):
        pass

    snn = trace_network(mixed(iter([LIF(), Own(), LIF()]))).to_snn()
    with pytest.raises(TypeError, match="a Own cannot be kept in a file"):
        save(snn, tmp_path / "snn.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_image_size(tmp_path: Path) -> None:
    """Of a network that takes one size; files of earlier versions do not say it."""
    torch.manual_seed(0)
    ann = models.vgg((4, "A"), num_classes=3, in_channels=1, image_size=6, neuron=lambda _: nn.ReLU(), hidden=(8,))
    snn = convert(ann, torch.rand(60, 1, 6, 6), steps=2, threshold="max", bias="none")
    save(snn, tmp_path / "snn.safetensors")
    for network in (snn, load(tmp_path / "snn.safetensors")):
        with pytest.raises(ValueError, match="8x8 pixels, but this network was built for 6x6"):
            network(torch.rand(2, 1, 8, 8), 2)
    tensors, card = weights.load_tensors(tmp_path / "snn.safetensors")
    assert from_card(tensors, without(card, "image_size"), "the file").image_size is None
    foreign = converted(bias="none")  # which flattens what its convolutions send
    save(foreign, tmp_path / "foreign.safetensors")
    assert load(tmp_path / "foreign.safetensors").image_size == foreign.image_size == (6, 6)


def test_the_card(tmp_path: Path) -> None:
    """What the caller adds is kept, but cannot pass for what the network needs."""
    snn = converted(bias="none")
    save(snn, tmp_path / "snn.safetensors", {"note": "mine", "steps": 99, "kind": "model"})
    _, card = weights.load_tensors(tmp_path / "snn.safetensors")
    assert (card["note"], card["steps"], card["kind"]) == ("mine", STEPS, "converted")
    with safe_open(tmp_path / "snn.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["ranvier"]) == card, "plain json, no code"
    assert load(tmp_path / "snn.safetensors").steps == STEPS


def test_loading_leaves_randomness_alone(tmp_path: Path) -> None:
    save(converted(bias="none"), tmp_path / "snn.safetensors")
    before = torch.get_rng_state()
    load(tmp_path / "snn.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not at all")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load(tmp_path / "broken.safetensors")
    save(converted(bias="none"), tmp_path / "snn.safetensors")
    whole = (tmp_path / "snn.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load(tmp_path / "half.safetensors")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    weights.save(nn.Linear(2, 2), tmp_path / "model.safetensors", {"recipe": "digits"})
    with pytest.raises(ValueError, match=r"model.safetensors holds no converted network.*ranvier.conversion.save"):
        load(tmp_path / "model.safetensors")


def without(card: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in card.items() if name != key}


def test_files_of_other_versions(tmp_path: Path) -> None:
    """Cards that lack something, have something more, or name what this version does not know."""
    save(converted(bias="none"), tmp_path / "snn.safetensors")
    tensors, card = weights.load_tensors(tmp_path / "snn.safetensors")
    from_card(tensors, card, "the file")
    graph, report = card["graph"], card["report"]
    path = next(path for path, entry in graph["modules"].items() if entry["class"] == "Activation")
    call = next(index for index, node in enumerate(graph["nodes"]) if node["op"] == "call_function")

    def with_node(**changes: str) -> dict[str, Any]:
        nodes = [dict(node) for node in graph["nodes"]]
        nodes[call].update(changes)
        return {**card, "graph": {**graph, "nodes": nodes}}

    def with_module(**changes: Any) -> dict[str, Any]:
        return {
            **card,
            "graph": {**graph, "modules": {**graph["modules"], path: {**graph["modules"][path], **changes}}},
        }

    cards = [
        *(without(card, key) for key in ("graph", "steps", "frame_dims", "report")),
        {**card, "graph": without(graph, "modules")},
        {**card, "graph": None},
        {**card, "report": {**report, "joules": 1.0}},
        {**card, "report": without(report, "chosen")},
        {**card, "report": {**report, "chosen": {**report["chosen"], "colour": "red"}}},
        with_node(target="teleport"),
        with_node(op="call_method"),
        with_module(**{"class": "Teleport"}),
        with_module(arguments={"num_channels": 4, "colour": "red"}),
    ]
    for number, other in enumerate(cards):
        with pytest.raises(ValueError, match="another version of ranvier"):
            pytest.fail(f"card {number} was taken: {from_card(tensors, other, 'the file')}")


def test_tensors_of_another_network(tmp_path: Path) -> None:
    save(converted(bias="none"), tmp_path / "snn.safetensors")
    tensors, card = weights.load_tensors(tmp_path / "snn.safetensors")
    with pytest.raises(ValueError, match=r"the file belong to another model.*1 missing \(network.acts.0"):
        from_card({key: value for key, value in tensors.items() if "acts.0.neuron.bias" not in key}, card, "the file")
    with pytest.raises(ValueError, match=r"1 of another shape"):
        from_card({**tensors, "network.head.weight": torch.zeros(3, 4)}, card, "the file")
