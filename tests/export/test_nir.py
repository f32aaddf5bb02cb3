"""NIR files against the networks that were written: read back, read without metadata, and run by other tools."""

import contextlib
import copy
import errno
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from ranvier import models
from ranvier.conversion import ConversionError, convert, decouple
from ranvier.evaluation import record_spikes
from ranvier.export import NIRReceipt, from_nir, nir_write, to_nir
from ranvier.export import nir as exporter
from ranvier.models import Network, SpikingNetwork
from ranvier.nn import IF, LIF, LIFB, PLIF, Readout, TimeFolded, analog
from ranvier.nn.structure import Activation, Chain, Residual, conv_norm
from ranvier.training import proxy_network

from .networks import STEPS, build, fitted

nir = pytest.importorskip("nir")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# Read back


def sew(neuron: Callable[[int], nn.Module]) -> Network:
    """Spikes that are added to spikes, in blocks with and without a layer in the shortcut; narrow."""

    def branch(inputs: int, stride: int) -> Chain:
        enter = conv_norm(inputs, 6, stride=stride)
        return Chain(enter, Activation(neuron(6)), conv_norm(6, 6), Activation(neuron(6)))

    project = Chain(conv_norm(4, 6, kernel_size=1, stride=2), Activation(neuron(6)))
    blocks = (Residual(branch(4, 2), project), Residual(branch(6, 1), Chain()), Residual(branch(6, 1), Chain()))
    body = Chain(Activation(neuron(4)), *blocks, TimeFolded(nn.AdaptiveAvgPool2d(1)))
    return Network(conv_norm(2, 4), body, Readout(6, 3))


def depthwise(neuron: Callable[[int], nn.Module]) -> Network:
    layers = (
        Activation(neuron(6)),
        TimeFolded(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)),
        Activation(neuron(6)),
        TimeFolded(nn.Conv2d(6, 4, 3, groups=2), nn.AvgPool2d(2)),
        Activation(neuron(4)),
    )
    for conv in (layers[1][0], layers[3][0]):
        conv.weight.mul_(4)
    return Network(conv_norm(2, 6), Chain(*layers), Readout(36, 3), image_size=8)


def small_vgg(neuron: Callable[[int], nn.Module]) -> Network:
    return models.vgg((4, "A", 6, "A"), num_classes=3, in_channels=2, image_size=8, neuron=neuron, hidden=(8,))


def mlp(neuron: Callable[[int], nn.Module]) -> Network:
    return models.mlp([12, 20, 20, 3], neuron=neuron)


BUILDERS: dict[str, tuple[Callable[[Callable[[int], nn.Module]], Network], tuple[int, ...]]] = {
    "mlp": (mlp, (12,)),
    "vgg": (small_vgg, (2, 8, 8)),
    "sew": (sew, (2, 8, 8)),
    "depthwise": (depthwise, (2, 8, 8)),
    "resnet20": (lambda neuron: models.resnet20(3, 2, neuron=neuron), (2, 8, 8)),
}
NEURONS: dict[str, Any] = {
    "LIF": LIF,
    "LIF soft": partial(LIF, reset="soft", tau=1.7, v_threshold=0.3),
    "PLIF": partial(PLIF, tau=1.7, v_threshold=0.7),
    "PLIF soft": partial(PLIF, tau=3.0, reset="soft"),
    "IF": IF,
    "IF soft": partial(IF, reset="soft", v_threshold=0.7),
    "LIFB": partial(LIFB, burst_init=1.5),
    "LIFB soft": partial(LIFB, burst_init=0.5, reset="soft", tau=3.0),
}


def made(builder: str, neuron: Any, batch: int = 6) -> tuple[Network, Tensor]:
    """A network in evaluation mode that fires, and images."""
    torch.manual_seed(0)
    build_network, shape = BUILDERS[builder]
    model = fitted(build_network(neuron), shape)
    for name, parameter in model.named_parameters():
        if name.endswith("strength"):
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    assert isinstance(model, Network)
    return model, torch.randn(batch, *shape)


def activities(model: nn.Module, images: Tensor, steps: int) -> list[float]:
    return [float((sent != 0).double().mean()) for sent in record_spikes(model, images, steps).values()]


CASES = [
    *(("mlp", neuron) for neuron in NEURONS),
    *(("vgg", neuron) for neuron in ("LIF", "IF soft", "LIFB")),
    *(("sew", neuron) for neuron in ("LIFB", "LIFB soft", "PLIF")),
    *(("depthwise", neuron) for neuron in ("LIF soft", "LIFB")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("builder", "neuron"), CASES)
def test_round_trip(tmp_path: Path, builder: str, neuron: str, dtype: torch.dtype) -> None:
    """Every spike is the same; logits but for the order of additions."""
    model, images = made(builder, NEURONS[neuron])
    model, images = model.to(dtype), images.to(dtype)
    receipt = to_nir(model, tmp_path / "a.nir", images=images, dt=7e-4, steps=STEPS)
    assert min(activities(model, images, STEPS)) > 0
    assert set(receipt.spike_mismatch.values()) == {0.0}
    assert len(receipt.spike_mismatch) == len(record_spikes(model, images, STEPS))
    assert receipt.logit_difference < (1e-5 if dtype == torch.float32 else 1e-13)
    assert receipt.same_predictions == 1
    network = from_nir(tmp_path / "a.nir")
    assert all(value.dtype == dtype for value in network.state_dict().values())
    torch.testing.assert_close(network(images, 5), model(images, 5))  # of other lengths, too


@pytest.mark.parametrize("neuron", ["IF", "LIFB"])
def test_round_trip_of_resnet20(tmp_path: Path, neuron: str) -> None:
    """In float64: in float32 some potential of twenty layers rounds across its threshold when they are folded."""
    model, images = made("resnet20", NEURONS[neuron], batch=3)
    receipt = to_nir(model.double(), tmp_path / "a.nir", images=images, steps=2, strict=neuron == "IF")
    assert min(activities(model, images.double(), 2)) > 0
    assert receipt.largest_mismatch == 0
    assert receipt.logit_difference < 1e-12
    assert len(receipt.spike_mismatch) == 19


@pytest.mark.parametrize("name", ["decoupled", "converted", "converted-signed"])
@pytest.mark.parametrize("double", [False, True])
def test_round_trip_of_what_conversion_made(tmp_path: Path, name: str, double: bool) -> None:
    """Thresholds, initial potentials for each neuron, a bias for each step, spikes that are taken back."""
    model, images = build(name)
    if double:
        model, images = model.double(), images.double()
    receipt = to_nir(model, tmp_path / "a.nir", images=images, steps=STEPS)
    assert set(receipt.spike_mismatch.values()) == {0.0}
    assert receipt.logit_difference < 1e-5
    if name != "decoupled":
        assert receipt.steps == STEPS
        assert to_nir(model, tmp_path / "a.nir", images=images).steps == STEPS  # those of the calibration
        assert receipt.plain_spike_mismatch > 0.01


def test_a_readout_that_forgets_is_metadata(tmp_path: Path) -> None:
    model, images = build("converted-leaky")
    receipt = to_nir(model, tmp_path / "a.nir", images=images, steps=STEPS)
    assert receipt.unsaid["leaky mean of the logits"] == ("output",)
    assert receipt.logit_difference < 1e-5
    read = from_nir(receipt.path)
    assert read.readout_decay == 0.5
    torch.testing.assert_close(read(images, STEPS), model(images, STEPS), rtol=0, atol=1e-5)
    assert from_nir(receipt.path, use_metadata=False).readout_decay == 1
    with pytest.raises(ValueError, match=r"leaky mean of the logits \(output\)"):
        to_nir(model, tmp_path / "b.nir", images=images, steps=STEPS, strict=True)


@pytest.mark.parametrize("bias", ["none", "light", "potential", "ftbc"])
@pytest.mark.parametrize("threshold", ["max", "mmse"])
def test_round_trip_of_every_calibration(tmp_path: Path, bias: Any, threshold: Any) -> None:
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 6, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    snn = convert(ann, torch.rand(40, 2, 9), steps=2, threshold=threshold, bias=bias)
    receipt = to_nir(snn, tmp_path / "a.nir", images=torch.rand(8, 2, 9))
    assert receipt.steps == 2
    assert receipt.largest_mismatch == 0
    again = to_nir(from_nir(receipt.path), tmp_path / "b.nir", images=torch.rand(8, 2, 9))
    each_step = any(len(neuron.bias) > 1 for neuron in snn.neurons.values())
    assert (again.steps, again.largest_mismatch, again.nodes) == (2 if each_step else 4, 0, receipt.nodes)


def test_round_trip_of_sew_resnet18(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bursts: 80 MB of weights, each layer after a neuron twice."""
    monkeypatch.setattr(nir, "write", partial(nir.write, compression=None))  # which takes most of the time
    torch.manual_seed(0)
    model = fitted(models.sew_resnet18(3, 2, neuron=partial(LIFB, burst_init=1.5)), (2, 8, 8)).double()
    images = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    receipt = to_nir(model, tmp_path / "a.nir", images=images, steps=2)
    assert receipt.largest_mismatch == 0
    assert receipt.logit_difference < 1e-12
    assert receipt.nodes["LIF"] == 2 * len(receipt.spike_mismatch) == 40
    assert receipt.bytes == os.path.getsize(receipt.path) > 1e8


def test_low_precision_is_compared_as_it_runs(tmp_path: Path) -> None:
    """The file is in float32; a network that rounds to 8 bits has other logits, and the receipt says so."""
    model, images = made("vgg", LIF)
    receipt = to_nir(model.bfloat16(), tmp_path / "a.nir", images=images)
    assert receipt.logit_difference > 1e-3
    assert from_nir(receipt.path)(images, 2).dtype == torch.float32
    assert model(images.bfloat16(), 2).dtype == torch.bfloat16  # as it was


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_networks_on_a_gpu(tmp_path: Path) -> None:
    model, images = made("vgg", LIFB)
    receipt = to_nir(model.double().cuda(), tmp_path / "a.nir", images=images)
    assert receipt.largest_mismatch == 0
    assert next(from_nir(receipt.path).parameters()).device.type == "cpu"


def test_what_was_read_is_written_as_it_was(tmp_path: Path) -> None:
    for builder, neuron in (("mlp", "LIFB"), ("sew", "LIFB"), ("depthwise", "PLIF"), ("vgg", "IF soft")):
        model, images = made(builder, NEURONS[neuron])
        first = to_nir(model, tmp_path / "a.nir", images=images)
        second = to_nir(from_nir(first.path), tmp_path / "b.nir", images=images)
        assert second.nodes == first.nodes
        assert second.largest_mismatch == 0
        graphs = [nir.read(receipt.path) for receipt in (first, second)]
        assert contents(graphs[0]) == contents(graphs[1])


def contents(graph: Any) -> list[tuple[str, list[float]]]:
    """Kind and sums of the numbers of each node."""
    return sorted(
        (
            type(node).__name__,
            [float(np.sum(value)) for _, value in sorted(vars(node).items()) if isinstance(value, np.ndarray)],
        )
        for node in graph.nodes.values()
    )


# Without metadata, and strict


def tied(neuron: Any, builder: str = "mlp") -> tuple[Network, Tensor]:
    """Weights, biases and images are multiples of 1/8: sums are exact, and many potentials are the threshold."""
    model, images = made(builder, neuron, batch=32)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.copy_(torch.randint(-4, 7, parameter.shape, generator=generator) / 8)
    for name, tensor in model.named_buffers():
        tensor.fill_(1.0 if name.endswith("running_var") else 0.0)
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 0.0
    return model, (4 * images).round() / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("builder", "neuron"),
    [
        *(("mlp", neuron) for neuron in (LIF, IF, partial(LIF, v_threshold=0.75))),
        *(("sew", neuron) for neuron in (LIF, IF, partial(LIF, v_threshold=0.75))),
        ("vgg", IF),
    ],
)
def test_strict_files_say_all_in_the_graph(tmp_path: Path, neuron: Any, builder: str, dtype: torch.dtype) -> None:
    """On inputs full of ties the network that others see is the same to the last spike."""
    model, images = tied(neuron, builder)
    model, images = model.to(dtype), images.to(dtype)
    loose = to_nir(model, tmp_path / "loose.nir", images=images, steps=6)
    strict = to_nir(model, tmp_path / "strict.nir", images=images, steps=6, strict=True)
    assert loose.unsaid.keys() == {"a tie with the threshold fires"}
    assert loose.plain_spike_mismatch > 0
    assert strict.unsaid == {}
    assert strict.plain_spike_mismatch == strict.largest_mismatch == 0
    assert strict.plain_same_predictions == 1
    assert loose.largest_mismatch == 0


@pytest.mark.parametrize("neuron", ["LIF", "IF", "PLIF"])
def test_without_metadata_hard_resets_are_the_same_but_for_ties(tmp_path: Path, neuron: str) -> None:
    """Random potentials do not tie; the charge of PLIF rounds otherwise, by 1e-16."""
    model, images = made("vgg", NEURONS[neuron])
    receipt = to_nir(model.double(), tmp_path / "a.nir", images=images)
    assert receipt.plain_spike_mismatch == 0
    assert receipt.plain_same_predictions == 1


@pytest.mark.parametrize("neuron", ["LIF soft", "LIFB"])
def test_without_metadata_other_resets_are_another_network(tmp_path: Path, neuron: str) -> None:
    model, images = made("vgg", NEURONS[neuron])
    receipt = to_nir(model.double(), tmp_path / "a.nir", images=images, steps=6)
    assert receipt.largest_mismatch == 0
    assert receipt.plain_spike_mismatch > 0.01


def test_free_running_pairs_need_no_metadata(tmp_path: Path) -> None:
    model, images = made("mlp", LIFB)
    free = decouple(model.double(), images.double(), free_running=True)
    receipt = to_nir(free, tmp_path / "a.nir", images=images, strict=True)
    assert receipt.plain_spike_mismatch == receipt.largest_mismatch == 0


# The receipt


def test_the_receipt_counts_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with other weights than the network's is found out."""
    model, images = made("mlp", LIF)
    array_of = nir_write.array_of
    monkeypatch.setattr(nir_write, "array_of", lambda tensor: array_of(tensor) + (tensor.ndim == 2) * 0.5)
    receipt = to_nir(model, tmp_path / "a.nir", images=images)
    assert receipt.largest_mismatch > 0.05
    assert receipt.logit_difference > 0.05
    assert receipt.plain_spike_mismatch > 0.05
    expected, found = model(images, 4), from_nir(receipt.path)(images, 4)
    assert receipt.logit_difference == pytest.approx(float((expected - found).abs().max() / expected.abs().max()))
    same = expected.mean(0).argmax(1) == found.mean(0).argmax(1)
    assert receipt.same_predictions == same.double().mean()
    ours = record_spikes(model, images, 4)["body.layers.0.neuron"]
    theirs = record_spikes(from_nir(receipt.path), images, 4)["network.body_0.neuron"]
    assert receipt.spike_mismatch["body.0"] == float((ours != theirs).sum()) / float(ours.sum())
    assert receipt.spikes == sum(int(sent.sum()) for sent in record_spikes(model, images, 4).values())


def doubling(weight: float, bias: float) -> models.Network:
    """Ten neurons, of which only the first gets a current, and a readout of two classes."""
    model = models.mlp([1, 10, 2], neuron=partial(IF, v_threshold=1.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.encoder[1].weight[0] = weight
        model.readout[1].weight[1, 0] = 1.0
        model.readout[1].bias[0] = bias
    return model


def test_mismatches_by_hand(tmp_path: Path) -> None:
    """One neuron ties and fires at each of 4 steps; for others a tie is silent, so that it fires at steps 2 and 4 only.

    Two values differ: of 40, nine in ten of which belong to neurons without input, or of 4 spikes.
    """
    model, images = doubling(1.0, bias=0.5), torch.ones(1, 1)
    receipt = to_nir(model, tmp_path / "a.nir", images=images, steps=4)
    plain = record_spikes(from_nir(tmp_path / "a.nir", use_metadata=False), images, 4)["network.body_0.neuron"]
    assert plain[:, 0, 0].tolist() == [0, 1, 0, 1]
    assert (receipt.spikes, receipt.spike_mismatch, receipt.plain_spike_mismatch) == (4, {"body.0": 0.0}, 0.5)
    assert receipt.same_predictions == 1
    assert receipt.plain_same_predictions == 0, "0.5 for both classes is no answer"


def test_a_silent_layer_counts_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = doubling(0.125, bias=0.5), torch.ones(3, 1)
    array_of = nir_write.array_of
    monkeypatch.setattr(nir_write, "array_of", lambda tensor: array_of(tensor * 8 ** (tensor.ndim == 2)))
    receipt = to_nir(model, tmp_path / "a.nir", images=images, steps=4)
    assert (receipt.spikes, receipt.spike_mismatch) == (0, {"body.0": 12.0})


def test_nothing_fires(tmp_path: Path) -> None:
    """Which the receipt says, since equal silence shows nothing; equal logits are no answers."""
    model = doubling(0.125, bias=0.0)
    receipt = to_nir(model, tmp_path / "a.nir", images=torch.ones(3, 1), steps=4)
    assert (receipt.spikes, receipt.largest_mismatch) == (0, 0)
    assert receipt.same_predictions == receipt.plain_same_predictions == 0
    for text in (str(receipt), printed(receipt)):
        assert "warning" in text
        assert "no neuron fired on these images" in " ".join(text.split())
    assert to_nir(doubling(1.0, 0.0), tmp_path / "a.nir", images=torch.ones(3, 1), steps=4).warning == ""


def test_the_receipt_in_a_line() -> None:
    assert str(RECEIPT) == (
        "runs/[red]/a.nir: 12,345 neurons, dt = 0.0005 s; 6,789 spikes on 100 images in 3 steps; read back: largest "
        "mismatch 0.0125 %, same predictions 99 %; without metadata: 3.12 %, 50 %"
    )


def test_the_receipt_says_what_was_written(tmp_path: Path) -> None:
    model, images = made("vgg", LIFB)
    receipt = to_nir(model, tmp_path / "a.nir", images=images, dt=5e-4, steps=3)
    assert receipt.path == str(tmp_path / "a.nir")
    assert (receipt.dt, receipt.steps, receipt.samples) == (5e-4, 3, 6)
    assert receipt.neurons == 2 * (4 * 64 + 6 * 16 + 8)
    assert receipt.bytes == (tmp_path / "a.nir").stat().st_size
    assert receipt.nodes["LIF"] == 6
    assert sum(receipt.nodes.values()) == len(nir.read(receipt.path).nodes)
    assert list(receipt.spike_mismatch) == ["body.0", "body.3", "body.7"]
    assert receipt.versions["ranvier"]


def printed(receipt: NIRReceipt, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(receipt)
    return console.file.getvalue()  # type: ignore[attr-defined]


RECEIPT = NIRReceipt(
    path="runs/[red]/a.nir",
    dt=5e-4,
    steps=3,
    samples=100,
    nodes={"Input": 1, "LIF": 6},
    neurons=12345,
    unsaid={
        "a tie with the threshold fires": ("body.0", "body.2", "body.[3]", "body.4", "body.5"),
        "soft reset": ("a",),
    },
    spikes=6789,
    spike_mismatch={"body.0": 0.0, "body.2": 0.000125},
    logit_difference=1.25e-7,
    same_predictions=0.99,
    plain_spike_mismatch=0.0312,
    plain_same_predictions=0.5,
    bytes=1_234_567,
    versions={"ranvier": "0.1"},
)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table(width: int) -> None:
    """All that counts, at any width; brackets are no markup."""
    text = printed(RECEIPT, width)
    squeezed = " ".join(
        "".join(character if character not in "│┃─━┏┓┗┛┡┩└┘├┤┌┐┬┴┼" else " " for character in text).split()
    )
    for words in (
        "runs/[red]/a.nir: 12,345 neurons, 1.2 MB, dt = 0.0005 s",
        "compared on 100 images, 3 steps; mismatches over 6,789 spikes",
        "1 Input, 6 LIF",
        "0.0125 %",
        "1.2e-07 of the largest",
        "99 %",
        "3.12 %",
        "50 %",
    ):
        assert words in squeezed, words
    if width >= 80:
        assert "body.0, body.2, body.[3] and 2 more" in squeezed
    assert max(map(len, text.splitlines())) <= max(width, 72)


def test_the_receipt_as_json(tmp_path: Path) -> None:
    RECEIPT.save(tmp_path / "receipt.json")
    assert NIRReceipt.load(tmp_path / "receipt.json") == RECEIPT
    assert json.loads((tmp_path / "receipt.json").read_text())["unsaid"]["soft reset"] == ["a"]
    model, images = made("mlp", LIFB)
    receipt = to_nir(model, tmp_path / "a.nir", images=images)
    receipt.save(tmp_path / "receipt.json")
    assert NIRReceipt.load(tmp_path / "receipt.json") == receipt
    assert printed(NIRReceipt.load(tmp_path / "receipt.json")) == printed(receipt)


def test_a_receipt_of_an_earlier_version(tmp_path: Path) -> None:
    """Whose mismatches are shares of all values: they would look a hundred times smaller."""
    content = asdict(RECEIPT)
    del content["spikes"]
    (tmp_path / "receipt.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="earlier version of ranvier, which divided differences by all values"):
        NIRReceipt.load(tmp_path / "receipt.json")


def test_the_largest_mismatch_is_of_all_layers() -> None:
    assert RECEIPT.largest_mismatch == 0.000125
    assert replace(RECEIPT, spike_mismatch={}).largest_mismatch == 0


# The call


def test_a_network_in_analog_mode_is_refused(tmp_path: Path) -> None:
    model, images = proxy_network(models.mlp([12, 20, 3])), torch.rand(4, 12)
    with analog(model), pytest.raises(ValueError, match=r"in analog mode.*with ranvier.nn.analog\(model\)"):
        to_nir(model, tmp_path / "a.nir", images=images)
    assert list(tmp_path.iterdir()) == []
    assert to_nir(model, tmp_path / "a.nir", images=images).spikes > 0


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    model, images = made("vgg", LIFB)
    model.train()
    model.readout.eval()
    before, randomness = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    to_nir(model, tmp_path / "a.nir", images=images)
    to_nir(model, tmp_path / "a.nir")
    assert (model.training, model.body.training, model.readout.training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), randomness)
    assert not model.body._forward_hooks
    assert not [hook for module in model.modules() for hook in module._forward_hooks]


def test_compiled_networks_and_inference_mode(tmp_path: Path) -> None:
    model, images = made("mlp", LIFB)
    with torch.inference_mode():
        receipt = to_nir(model, tmp_path / "a.nir", images=images.clone())
    assert receipt.largest_mismatch == 0
    compiled = torch.compile(model)
    assert to_nir(compiled, tmp_path / "b.nir", images=images).spike_mismatch == receipt.spike_mismatch
    assert (tmp_path / "a.nir").read_bytes()[:1000] == (tmp_path / "b.nir").read_bytes()[:1000]


def test_images_are_made_up_where_the_network_tells_their_size(tmp_path: Path) -> None:
    model, _ = made("vgg", LIF)
    receipt = to_nir(model.double(), tmp_path / "a.nir")
    assert (receipt.samples, receipt.steps) == (8, 4)
    assert receipt.largest_mismatch == 0
    with pytest.raises(ValueError, match="Pass a batch"):
        to_nir(decouple(model), tmp_path / "b.nir")
    assert not (tmp_path / "b.nir").exists()


def test_compared_on_a_sequence(tmp_path: Path) -> None:
    """Of three steps, each with images of its own; what is written is the same."""
    model, images = made("vgg", LIF, batch=4)
    frames = torch.stack([images, images.flip(0), 0 * images])
    receipt = to_nir(model.double(), tmp_path / "a.nir", images=frames)
    assert (receipt.steps, receipt.samples) == (3, 4)
    assert receipt.largest_mismatch == 0
    assert receipt.spikes == sum(int(sent.sum()) for sent in record_spikes(model, frames.double()).values())
    assert to_nir(model, tmp_path / "b.nir", images=images).nodes == receipt.nodes
    with pytest.raises(ValueError, match="3 steps, but steps=2"):
        to_nir(model, tmp_path / "c.nir", images=frames, steps=2)
    assert not (tmp_path / "c.nir").exists()


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (
            torch.rand(12),
            ValueError,
            r"\[12\], but must be constant images \[B, ...\] of 2 or 4 dimensions, or a sequence",
        ),
        (torch.rand(0, 12), ValueError, r"images have shape \[0, 12\], but must be .* at least one image and one step"),
        (torch.rand(0, 2, 12), ValueError, r"images have shape \[0, 2, 12\], but must be .* one image and one step"),
        (torch.rand(3, 2, 11), ValueError, r"\[2, 11\].*Pass a batch of its images"),
        (torch.rand(2, 11), ValueError, r"\[2, 11\].*Pass a batch of its images"),
        (torch.ones(2, 12, dtype=torch.uint8), TypeError, "images are a tensor of torch.uint8"),
        ([[0.0] * 12], TypeError, "images are a list"),
    ],
)
def test_images_that_the_network_does_not_take(tmp_path: Path, images: Any, error: type[Exception], match: str) -> None:
    model, _ = made("mlp", LIF)
    with pytest.raises(error, match=match):
        to_nir(model, tmp_path / "a.nir", images=images)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("images", [None, torch.rand(2, 3)])
def test_models_that_are_no_networks(tmp_path: Path, images: Tensor | None) -> None:
    with pytest.raises(TypeError, match=r"is a Linear, but must be a .*etwork of ranvier\.models"):
        to_nir(nn.Linear(3, 3), tmp_path / "a.nir", images=images)


def test_anns_are_refused(tmp_path: Path) -> None:
    model, images = build("ann")
    with pytest.raises(ConversionError, match=r"it is an ANN\. Convert it first"):
        to_nir(model, tmp_path / "a.nir", images=images)


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_steps_out_of_range(tmp_path: Path, steps: Any) -> None:
    model, images = made("mlp", LIF)
    with pytest.raises(ValueError, match=f"steps is {steps}, but must be a whole number"):
        to_nir(model, tmp_path / "a.nir", images=images, steps=steps)


# Failed writes


def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "a.nir"
    path.write_text("old")
    return path


def test_more_steps_than_calibrated_write_nothing(tmp_path: Path) -> None:
    path = old_file(tmp_path)
    snn, images = build("converted")
    with pytest.raises(ValueError, match="step 9 was asked for, but the biases were calibrated for steps 1 to 3"):
        to_nir(snn, path, images=images, steps=9)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old_file(tmp_path)
    model, images = made("mlp", LIF)

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"could not write .*a\.nir .*No space left.*untouched"):
        to_nir(model, path, images=images)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_really_fails_keeps_the_old_file(tmp_path: Path) -> None:
    """With a limit on file sizes, as on a full disk; HDF5 itself would raise a RuntimeError when it closes."""
    resource = pytest.importorskip("resource")
    path = old_file(tmp_path)
    model, images = made("mlp", LIF)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, hard))
    try:
        with pytest.raises(OSError, match=r"could not write .*a\.nir"):
            to_nir(model, path, images=images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_comparison_that_fails_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = old_file(tmp_path)
    model, images = made("mlp", LIF)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(exporter, "from_nir", fail)
    with pytest.raises(type(error)):
        to_nir(model, path, images=images)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    model, images = made("mlp", LIF)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not write .*file/a\.nir"):
        to_nir(model, tmp_path / "file" / "a.nir", images=images)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"could not write .*folder"):
        to_nir(model, tmp_path / "folder", images=images)
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "folder"}
    assert not list((tmp_path / "folder").iterdir())


def test_folders_are_made_and_files_replaced(tmp_path: Path) -> None:
    model, images = made("mlp", LIF)
    path = tmp_path / "new" / "folder" / "a.nir"
    for _ in range(2):
        receipt = to_nir(model, str(path), images=images)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.nir"]
    assert receipt.bytes == path.stat().st_size


# Run by other tools


class Euler(nn.Module):
    """A neuron of NIR as its documentation has it, for tools that bring none."""

    def __init__(self, node: Any, dt: float) -> None:
        super().__init__()
        self.dt = dt
        self.leaky = hasattr(node, "tau")
        for name in ("tau", "r", "v_leak", "v_threshold", "v_reset"):
            if hasattr(node, name):
                self.register_buffer(name, torch.from_numpy(getattr(node, name)))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v = torch.zeros_like(x) if state is None else state
        v = v + (self.dt / self.tau * (self.v_leak - v + self.r * x) if self.leaky else self.dt * self.r * x)
        fired = v > self.v_threshold
        return fired.to(x.dtype), torch.where(fired, self.v_reset, v)


def affine(node: Any) -> nn.Module:
    """With its bias, which nirtorch's own map puts elsewhere (2.6)."""
    layer = nn.Linear(node.weight.shape[1], node.weight.shape[0])
    layer.load_state_dict({"weight": torch.from_numpy(node.weight), "bias": torch.from_numpy(node.bias)})
    return layer


def run_by_nirtorch(path: Path, dt: float) -> nn.Module:
    nirtorch = pytest.importorskip("nirtorch", reason="needs nirtorch: pip install nirtorch")
    node_map = {
        nir.LIF: partial(Euler, dt=dt),
        nir.IF: partial(Euler, dt=dt),
        nir.Affine: affine,
        nir.Flatten: lambda node: nn.Flatten(node.start_dim + 1, node.end_dim),  # its own flattens the batch
    }
    return nirtorch.nir_to_torch(nir.read(path), node_map, dtype=torch.float64)


def run_by_spikingjelly(path: Path, dt: float) -> nn.Module:
    reason = "needs spikingjelly: pip install --no-deps -r peers.txt"
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange", reason=reason)
    return exchange.import_from_nir(path, dt=dt, dtype=torch.float64)


def run_by_snntorch(path: Path, dt: float) -> nn.Module:
    assert dt == 1e-4  # which it takes for granted
    importer = pytest.importorskip("snntorch.import_nir", reason="needs snntorch and nirtorch: pip install snntorch")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints arrays
        return importer.import_from_nir(nir.read(path))


def spikes_of(network: nn.Module, images: Tensor, steps: int) -> tuple[dict[str, Tensor], Tensor]:
    """Spikes `[T, B, ...]` of each neuron by name, and outputs, of a network that is called once for each step."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str, output: Any) -> None:
        found.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in network.named_children()
    ]
    state, outputs = None, []
    for _ in range(steps):
        output, state = network(images, state)
        outputs.append(output)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(sent) for name, sent in found.items()}, torch.stack(outputs)


def compared(model: SpikingNetwork, path: Path, run: Any, images: Tensor, steps: int, dt: float) -> Tensor:
    """Whether every spike of a peer is ours; its logits."""
    ours = record_spikes(model, images, steps)
    written, _, _ = nir_write.translated(model, images, dt, False)
    peer, outputs = spikes_of(run(path, dt), images, steps)
    for (name, sent), node in zip(ours.items(), map(nir_write.node_name, written.neurons), strict=True):
        assert 0 < sent.mean() < 1, name
        assert torch.equal(peer[node], sent), name
    return outputs


PEERS = {"nirtorch": run_by_nirtorch, "spikingjelly": run_by_spikingjelly, "snntorch": run_by_snntorch}
PRECISION = {"nirtorch": torch.float64, "spikingjelly": torch.float64, "snntorch": torch.float32}
"""In which they run; the spikes of snntorch are float32 whatever the weights."""
DT = 1e-4
FOR_ALL = (("mlp", "LIF", False), ("mlp", "LIF", True), ("mlp", "PLIF", False))
"""Files that every peer runs: network, neuron, and whether it is strict."""
NOT_FOR_SNNTORCH = (
    ("mlp", "IF", False),
    ("vgg", "LIF", False),
    ("vgg", "IF", True),
    ("depthwise", "LIF", False),
    ("resnet20", "LIF", False),
)
"""Files that all others run. `test_what_snntorch_does_not_run` holds that these are right to be here."""


@pytest.mark.parametrize(
    ("peer", "builder", "neuron", "strict"),
    [(peer, *file) for peer in PEERS for file in FOR_ALL + NOT_FOR_SNNTORCH * (peer != "snntorch")],
)
def test_peers_run_our_files(tmp_path: Path, peer: str, builder: str, neuron: str, strict: bool) -> None:
    """Hard resets, no ties: every spike of every step is ours."""
    model, images = made(builder, NEURONS[neuron], batch=3)
    model, images = model.to(PRECISION[peer]), images.to(PRECISION[peer])
    path = tmp_path / "a.nir"
    to_nir(model, path, images=images, dt=DT, steps=1, strict=strict)
    outputs = compared(model, path, PEERS[peer], images, 5, DT)
    torch.testing.assert_close(outputs, model(images, 5))


@pytest.mark.parametrize(("builder", "neuron", "strict"), NOT_FOR_SNNTORCH)
def test_what_snntorch_does_not_run(tmp_path: Path, builder: str, neuron: str, strict: bool) -> None:
    """Limits of snntorch 1.0.0: the r of IF has to be 1, whatever dt, and flattening takes the batch, too.

    What it runs one day fails here, and moves to `FOR_ALL`.
    """
    model, images = made(builder, NEURONS[neuron], batch=3)
    path = tmp_path / "a.nir"
    to_nir(model, path, images=images, dt=DT, steps=1, strict=strict)
    one_row = r"shapes cannot be multiplied \(1x"  # where three images make three
    error, message = {"IF": (AssertionError, "^r != 1 not supported"), "LIF": (RuntimeError, one_row)}[neuron]
    with pytest.raises(error, match=message):
        spikes_of(run_by_snntorch(path, DT), images, 1)


def test_snntorch_has_no_if(tmp_path: Path) -> None:
    """Also where r is 1: snntorch 1.0.0 runs a leaky neuron, which keeps 9/10 of its potential, and hands on a tuple.

    A current of 1/8 sums up to 13/8 in 13 steps, above a threshold of 3/2; with the leak it never exceeds 5/4.
    """
    path, current, steps = tmp_path / "a.nir", torch.full((1, 1), 0.125), 13
    nodes = {
        "input": nir.Input(input_type={"input": np.array([1])}),
        "fire": nir.IF(r=np.ones(1), v_threshold=np.full(1, 1.5)),
        "output": nir.Output(output_type={"output": np.array([1])}),
    }
    nir.write(path, nir.NIRGraph(nodes=nodes, edges=[("input", "fire"), ("fire", "output")]))
    assert from_nir(path, dt=1.0)(current, steps).flatten().tolist() == [0] * 12 + [1]
    network, state, sent = run_by_snntorch(path, DT), None, []
    for _ in range(steps):
        output, state = network(current, state)
        sent.append(output[0] if isinstance(output, tuple) else output)
    assert torch.stack(sent).flatten().tolist() == [0] * steps

    model, images = made("mlp", IF, batch=3)
    to_nir(model, path, images=images, dt=1.0, steps=1)  # which makes r 1
    with pytest.raises(TypeError, match="must be Tensor, not tuple"):
        spikes_of(run_by_snntorch(path, DT), images, 1)


@pytest.mark.parametrize("builder", ["vgg", "depthwise", "resnet20"])
def test_snntorch_runs_single_images(tmp_path: Path, builder: str) -> None:
    model, images = made(builder, LIF, batch=1)
    path = tmp_path / "a.nir"
    to_nir(model, path, images=images, dt=DT, steps=1)
    _, outputs = spikes_of(run_by_snntorch(path, DT), images[0], 5)
    torch.testing.assert_close(outputs, model(images, 5)[:, 0])


@pytest.mark.parametrize("peer", PEERS)
def test_strict_files_tie_where_others_run_them(tmp_path: Path, peer: str) -> None:
    """NIR, nirtorch and snntorch fire above the threshold, spikingjelly and ours also at it."""
    model, images = tied(partial(LIF, v_threshold=0.75))
    model, images = model.to(PRECISION[peer]), images.to(PRECISION[peer])
    path = tmp_path / "a.nir"
    to_nir(model, path, images=images, dt=DT, strict=True)
    compared(model, path, PEERS[peer], images, 6, DT)
    to_nir(model, path, images=images, dt=DT)
    if peer == "spikingjelly":
        compared(model, path, PEERS[peer], images, 6, DT)
    else:
        with pytest.raises(AssertionError, match="body"):
            compared(model, path, PEERS[peer], images, 6, DT)


def test_sinabs_runs_soft_resets(tmp_path: Path) -> None:
    """It subtracts at a reset, fires at ties, and takes IF for steps of one: the network that our metadata say, as long
    as no potential is below minus a threshold, where it has a floor, or above two, where it sends several spikes."""
    pytest.importorskip("sinabs.layers", reason="needs sinabs: pip install --no-deps -r peers.txt")
    exchange = pytest.importorskip("sinabs.nir", reason="needs nirtorch: pip install nirtorch")
    torch.manual_seed(0)
    model = models.mlp([12, 20, 20, 3], neuron=partial(IF, v_threshold=1.0, reset="soft"))
    for layer in (model.encoder[1], model.body.layers[1][0]):
        layer.weight.uniform_(0, 2 / layer.in_features)
    images = torch.rand(6, 12)
    path, steps = tmp_path / "a.nir", 8
    to_nir(model, path, images=images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # nirtorch of its own interface, which sinabs uses
        network = exchange.from_nir(nir.read(path), batch_size=len(images))
    found: dict[str, Tensor] = {}
    for name in ("body_0", "body_2"):
        module = getattr(network, name)
        module.register_forward_hook(lambda _, __, sent, name=name: found.__setitem__(name, sent))
    outputs, _ = network(images.repeat_interleave(steps, 0))  # [B T, ...]

    def time_first(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, steps)).transpose(0, 1)

    for (name, sent), node in zip(record_spikes(model, images, steps).items(), found, strict=True):
        assert 0.1 < sent.mean() < 0.9, name
        assert torch.equal(time_first(found[node]), sent), name
    torch.testing.assert_close(time_first(outputs), model(images, steps))
