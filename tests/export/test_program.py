import copy
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import ranvier
from ranvier import models
from ranvier.dynamics import NeuronState
from ranvier.export import ExportError, Receipt, to_program
from ranvier.nn import LIF, AffineIF, Neuron
from ranvier.nn.structure import Activation, Chain

from .networks import FAMILIES, STEPS, build, rates

# Tracing takes a second and more: larger networks are traced, in the same way, by tests/export/test_onnx.py.
IN_ALL_STEPS = ("mlp-if", "mlp-plif", "mlp-lifb", "vgg", "dense", "converted", "converted-leaky")
STEP_BY_STEP = ("mlp-plif", "decoupled", "vgg", "dense", "converted", "converted-signed", "converted-leaky", "ann")


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def loaded(path: str | Path) -> nn.Module:
    return torch.export.load(str(path)).module()


def stream(program: nn.Module, receipt: Receipt, frames: list[Tensor]) -> Tensor:
    """Logits `[T, B, K]` of a streaming program, one step at a time, from zeros."""
    state = [port.zeros(len(frames[0])) for port in receipt.inputs[1:]]
    logits = []
    for frame in frames:
        now, *state = program(frame, *state)
        logits.append(now)
    return torch.stack(logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_networks_of_these_tests_fire(name: str) -> None:
    """In every layer some values are sent and some are not: else nothing would be compared."""
    model, images = build(name)
    assert all(0.005 < rate < 0.9 for rate in rates(model, images, STEPS)), rates(model, images, STEPS)


@pytest.mark.parametrize("name", IN_ALL_STEPS)
def test_all_steps(name: str, tmp_path: Path) -> None:
    """The same operations in the same order: bit for bit, at any batch size."""
    model, images = build(name)
    receipt = to_program(model, tmp_path / "net.pt2", images=images, steps=STEPS)
    assert (receipt.difference, receipt.flipped, receipt.agreement) == (0.0, 0, 1.0)
    assert receipt.inputs[0].shape == ("batch", *images.shape[1:])
    assert receipt.outputs[0].shape == (STEPS, "batch", 3)
    program = loaded(receipt.path)
    for batch in (1, 5):  # traced with 2
        assert torch.equal(program(images[:batch]), model(images[:batch], STEPS))


@pytest.mark.parametrize("name", STEP_BY_STEP)
def test_one_step(name: str, tmp_path: Path) -> None:
    """Carried from zeros, T calls give one call of T steps, also where every step has an input of its own."""
    model, images = build(name)
    receipt = to_program(model, tmp_path / "net.pt2", images=images, steps=STEPS, streaming=True)
    assert receipt.flipped == 0
    assert [port.name for port in receipt.outputs[1:]] == [f"next_{port.name}" for port in receipt.inputs[1:]]
    frames = [torch.randn(5, *images.shape[1:]) if "converted" not in name else images[t : t + 5] for t in range(STEPS)]
    found = stream(loaded(receipt.path), receipt, frames)
    expected = model(torch.stack(frames))
    # A readout on B rows instead of T B may add in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=receipt.tolerance)


def test_states_are_named_in_the_order_in_which_they_run(tmp_path: Path) -> None:
    model, images = build("converted-signed")
    receipt = to_program(model, tmp_path / "net.pt2", images=images, steps=STEPS, streaming=True)
    assert [(port.name, port.shape, port.dtype, port.holds) for port in receipt.inputs[1:]] == [
        ("state_0", (), "int64", "steps so far"),
        ("state_1", ("batch", 4, 8, 8), "float32", "potentials of network.1"),
        ("state_2", ("batch", 4, 8, 8), "float32", "spikes less negative ones so far of network.1"),
        ("state_3", ("batch", 6, 2, 2), "float32", "potentials of network.4"),
        ("state_4", ("batch", 6, 2, 2), "float32", "spikes less negative ones so far of network.4"),
    ]


def test_states_of_a_readout_that_forgets_come_last(tmp_path: Path) -> None:
    model, images = build("converted-leaky")
    receipt = to_program(model, tmp_path / "net.pt2", images=images, steps=STEPS, streaming=True)
    assert [(port.shape, port.holds) for port in receipt.inputs[-4:]] == [
        (("batch", 3), "sums so far of the readout"),
        (("batch", 3), "logits sent so far of the readout"),
        ((), "weight of the steps so far of the readout"),
        ((), "steps so far of the readout"),
    ]


def test_a_stream_ends_where_its_biases_do(tmp_path: Path) -> None:
    """The step past the last calibrated one is refused, not clipped."""
    model, images = build("converted")
    receipt = to_program(model, tmp_path / "net.pt2", images=images, steps=STEPS, streaming=True)
    program = loaded(receipt.path)
    state = [port.zeros(8) for port in receipt.inputs[1:]]
    state[0] += STEPS
    with pytest.raises(IndexError, match="out of range"):
        program(images, *state)
    with pytest.raises(ValueError, match=f"step {STEPS + 1} was asked for"):
        to_program(model, tmp_path / "net.pt2", images=images, steps=STEPS + 1, streaming=True)


def test_plain_operations_only(tmp_path: Path) -> None:
    """No autograd function, no kernel of ours: it loads where ranvier is not installed."""
    model, images = build("mlp-lifb")
    path = to_program(model, tmp_path / "net.pt2", images=images, steps=STEPS).path
    nodes = torch.export.load(path).graph.nodes
    called = {str(node.target) for node in nodes if node.op == "call_function"}
    assert "aten.ge.Scalar" in called
    assert all(target.startswith(("aten.", "<built-in function")) for target in called), called
    assert {node.op for node in nodes} <= {"placeholder", "call_function", "output"}


def test_card(tmp_path: Path) -> None:
    model, images = build("mlp-lif")
    names = ["ant", "bee", "cat"]
    to_program(model, tmp_path / "net.pt2", images=images, steps=STEPS, class_names=names)
    files = {"ranvier.json": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=files)
    card = json.loads(files["ranvier.json"])
    assert card["class_names"] == names
    assert (card["steps"], card["layout"], card["streaming"], card["state"]) == (STEPS, "[T, B, K]", False, {})
    assert card["ranvier"] == ranvier.provenance.versions()["ranvier"]
    with pytest.raises(ValueError, match="class_names has 2 names, but the network tells 3 classes apart"):
        to_program(model, tmp_path / "net.pt2", images=images, steps=STEPS, class_names=names[:2])


def test_nothing_private_goes_out(tmp_path: Path) -> None:
    """Neither paths of the machine nor the user's images."""
    model, images = build("mlp-lif")
    to_program(model, tmp_path / "net.pt2", images=images, steps=STEPS)
    with zipfile.ZipFile(tmp_path / "net.pt2") as file:
        content = b"".join(file.read(name) for name in file.namelist())
    assert str(Path(ranvier.__file__).parent).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content
    assert images[0].numpy().tobytes() not in content
    assert model.readout[1].weight.numpy().tobytes() in content, "so that the search can find something"


def test_a_fixed_batch(tmp_path: Path) -> None:
    model, images = build("mlp-lif")
    receipt = to_program(model, tmp_path / "net.pt2", images=images, steps=STEPS, dynamic_batch=False)
    assert receipt.inputs[0].shape == (8, 12)
    assert receipt.batch_sizes == (8,)
    program = loaded(receipt.path)
    assert torch.equal(program(images), model(images, STEPS))
    with pytest.raises(RuntimeError, match="to be equal to 8, but got 3"):
        program(images[:3])


def test_the_model_is_left_as_it_is(tmp_path: Path) -> None:
    """A model in training mode is exported in evaluation mode, and stays in training mode."""
    model, images = build("vgg")
    expected = model(images, STEPS)
    before = copy.deepcopy(model.state_dict())
    model.train()
    model.body.layers[0].eval()
    modes = [module.training for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    receipt = to_program(model, tmp_path / "net.pt2", images=images, steps=STEPS, streaming=True)
    assert receipt.difference < receipt.tolerance
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert {module.implementation for module in model.modules() if isinstance(module, Neuron)} == {"auto"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.allclose(stream(loaded(receipt.path), receipt, [images] * STEPS), expected, atol=receipt.tolerance)


def test_compiled_models(tmp_path: Path) -> None:
    """What is exported is the network inside; nothing is compiled for it."""
    model, images = build("mlp-lif")
    receipt = to_program(torch.compile(model), tmp_path / "net.pt2", images=images, steps=1)
    assert receipt.difference == 0
    model.compile()
    assert to_program(model, tmp_path / "net.pt2", images=images, steps=1).difference == 0


def test_gradients_and_inference_mode_do_not_matter(tmp_path: Path) -> None:
    model, images = build("mlp-lif")
    with torch.enable_grad():
        to_program(model.requires_grad_(), tmp_path / "a.pt2", images=images.clone().requires_grad_(), steps=1)
    with torch.inference_mode():
        to_program(model, tmp_path / "b.pt2", images=images.clone(), steps=1)
    assert torch.equal(loaded(tmp_path / "a.pt2")(images), loaded(tmp_path / "b.pt2")(images))


class Deciding(Neuron):
    """A neuron that looks at values, which no trace can follow."""

    def scan(self, current: Tensor, state: object) -> tuple[Tensor, object]:
        return (current if current.sum() > 0 else -current), state


class Counting(Neuron):
    """A neuron whose state is no tensor."""

    def scan(self, current: Tensor, state: int | None) -> tuple[Tensor, int]:  # type: ignore[override]
        return current.relu(), (state or 0) + len(current)


class Trace(NamedTuple):
    slow: Tensor
    fast: Tensor


class Filtering(Neuron):
    """A neuron of a user's own with two tensors of state."""

    def scan(self, current: Tensor, state: Trace | None) -> tuple[Tensor, Trace]:  # type: ignore[override]
        slow, fast = state or (torch.zeros_like(current[0]),) * 2
        sent = []
        for x in current.unbind(0):
            slow, fast = slow + (x - slow) / 4, fast + (x - fast) / 2
            sent.append((fast - slow > 0.1).to(x.dtype))
        return torch.stack(sent), Trace(slow, fast)


def test_neurons_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = models.mlp([12, 8, 3], neuron=lambda _: Filtering()), torch.rand(8, 12)
    receipt = to_program(model, tmp_path / "net.pt2", images=images, steps=4, streaming=True)
    assert [port.holds for port in receipt.inputs[1:]] == [
        "steps so far",
        "slow of body.layers.0",
        "fast of body.layers.0",
    ]
    assert 0 < rates(model, images, 4)[0] < 1


class FromHalf(Neuron):
    """A neuron of a user's own that starts at half its threshold."""

    def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
        v = torch.full_like(current[0], 0.5) if state is None else state.v
        sent = []
        for x in current.unbind(0):
            v = v + x
            sent.append((v >= 1).to(x.dtype))
            v = v - sent[-1]
        return torch.stack(sent), NeuronState(v)


@pytest.mark.parametrize(
    "neuron",
    [
        lambda: AffineIF(tau=2.0, v_leak=0.1, v_threshold=0.5),
        lambda: AffineIF(tau=torch.tensor([2.0, 4.0]), v_leak=torch.tensor([0.3, -0.4]), v_threshold=0.5, v_reset=-0.1),
        lambda: AffineIF(tau=None, r=0.5, v_threshold=0.5, v_reset=-0.25),
        lambda: AffineIF(tau=3.0, v_leak=0.2, fires=False),
        FromHalf,
    ],
    ids=["leaky", "each", "integrator", "silent", "own"],
)
def test_neurons_that_do_not_rest_at_zero(neuron: object, tmp_path: Path) -> None:
    """Zeros come in, and the first step begins where the network does; beside a neuron that rests at 0."""
    body = Chain(Activation(neuron()), Activation(LIF(v_threshold=0.125)))
    model = models.Network(nn.Identity(), body, nn.Identity(), frame_dims=(2,))
    images = torch.rand(16, 2)
    receipt = to_program(model, tmp_path / "net.pt2", images=images, steps=4, streaming=True)
    assert (receipt.difference, receipt.flipped) == (0, 0)
    assert receipt.inputs[1].holds == "steps so far"
    frames = list(torch.rand(4, 5, 2))
    expected = model(torch.stack(frames))
    assert 0 < expected.mean() < 1
    assert torch.equal(stream(loaded(receipt.path), receipt, frames), expected)
    state = [port.zeros(5) for port in receipt.inputs[1:]]
    _, *after = loaded(receipt.path)(frames[0], *state)
    _, (first, _) = model(frames[0], 1, return_state=True)
    assert torch.equal(after[1], first.v)


def test_one_sample_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that starts from 0 where the network starts from 0.1 differs in one of 16 samples; nothing is written."""
    body = Chain(Activation(AffineIF(tau=2.0, v_leak=0.1, v_threshold=0.5)))
    model = models.Network(nn.Identity(), body, nn.Identity(), frame_dims=(2,))
    images = torch.full((16, 2), 0.3)
    images[1, 0] = 0.85
    monkeypatch.setattr("ranvier.export.program.FROM_ZERO", (AffineIF,))
    with pytest.raises(ExportError, match="in 1 of 17 samples .* moves 0 of these"):
        to_program(model, tmp_path / "net.pt2", images=images, steps=1, streaming=True)
    assert list(tmp_path.iterdir()) == []


def test_neurons_that_cannot_be_traced(tmp_path: Path) -> None:
    images = torch.rand(4, 12)
    with pytest.raises(ExportError, match=r"torch.export cannot trace the network: .*ranvier.kernels.scan"):
        to_program(models.mlp([12, 8, 3], neuron=lambda _: Deciding()), tmp_path / "net.pt2", images=images, steps=2)
    model = models.mlp([12, 8, 3], neuron=lambda _: Counting())
    with pytest.raises(ExportError, match=r"body.layers.0.neuron has a int as state, .*NamedTuple of tensors"):
        to_program(model, tmp_path / "net.pt2", images=images, steps=2, streaming=True)
    assert list(tmp_path.iterdir()) == []
    assert to_program(model, tmp_path / "net.pt2", images=images, steps=2).difference == 0


@pytest.mark.parametrize(
    ("images", "steps", "error", "message"),
    [
        (torch.rand(3, 8, 12), 3, ValueError, r"\[3, 8, 12\], but export takes a constant input of 2 or 4 dim"),
        (torch.rand(0, 12), 3, ValueError, "B > 0"),
        (torch.rand(8, 11), 3, ValueError, r"images have shape .*, 11 values each, but this network was built for 12"),
        (torch.rand(8, 12).double(), 3, TypeError, "a tensor of torch.float64, but must be a torch.Tensor of float32"),
        ([0.0] * 12, 3, TypeError, "images are a list"),
        (torch.full((8, 12), torch.nan), 3, ValueError, "NaN or infinity"),
        (torch.rand(8, 12), 0, ValueError, "steps is 0"),
    ],
)
def test_images_that_do_not_fit(images: Tensor, steps: int, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        to_program(models.mlp([12, 8, 3]), tmp_path / "net.pt2", images=images, steps=steps)
    assert list(tmp_path.iterdir()) == []


def test_image_size(tmp_path: Path) -> None:
    model, _ = build("vgg")
    with pytest.raises(ValueError, match="8x8"):
        to_program(model, tmp_path / "net.pt2", images=torch.rand(8, 1, 9, 9), steps=1)
    with pytest.raises(ValueError, match=r"images have shape .*, 3 channels, but this network was built for 1"):
        to_program(model, tmp_path / "net.pt2", images=torch.rand(8, 3, 8, 8), steps=1)


@pytest.mark.parametrize("model", [nn.Linear(12, 3), nn.DataParallel(models.mlp([12, 8, 3])), LIF(), None])
def test_what_is_no_network(model: nn.Module, tmp_path: Path) -> None:
    name = type(model).__name__
    with pytest.raises(TypeError, match=f"model is a {name}, but export knows networks of ranvier.models"):
        to_program(model, tmp_path / "net.pt2", images=torch.rand(8, 12), steps=1)


def test_other_dtypes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensors of torch.float64. Export float32: model.float\(\)"):
        to_program(models.mlp([12, 8, 3]).double(), tmp_path / "net.pt2", images=torch.rand(8, 12), steps=1)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = build("mlp-lif")
    with pytest.raises(ValueError, match=r"net.onnx, but must end in .pt2"):
        to_program(model, tmp_path / "net.onnx", images=images, steps=1)
    (tmp_path / "file").write_text("a file, and no folder")
    with pytest.raises(OSError, match=r"could not write .*net.pt2"):
        to_program(model, tmp_path / "file" / "net.pt2", images=images, steps=1)
    assert (tmp_path / "file").read_text() == "a file, and no folder"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    old = tmp_path / "net.pt2"
    old.write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        to_program(model, old, images=images, steps=1)
    assert old.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "net.pt2"]


def test_a_file_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = build("mlp-lif")
    old = tmp_path / "net.pt2"
    old.write_text("old")
    load = torch.export.load

    def wrong(file: object) -> object:
        program = load(file)
        program.state_dict["network.readout.1.bias"] += 0.1
        return program

    monkeypatch.setattr(torch.export, "load", wrong)
    with pytest.raises(ExportError, match="does not compute what the network does: logits differ by up to 1.00e-01"):
        to_program(model, old, images=images, steps=1)
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]
