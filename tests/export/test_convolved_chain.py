"""Networks in which a convolution and its neurons are one kernel, against the same networks in which they are two."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranvier import models
from ranvier.export import InferenceNetwork, to_inference
from ranvier.export.convolved_chain import ConvolvedChain, Pair
from ranvier.kernels import native_convolved_scan
from ranvier.nn import IF, LIF, LIFB, PLIF, BatchNorm, TimeFolded
from ranvier.nn.structure import Activation, Chain, NeuronFactory, Residual

from .networks import check_streamed_and_apart, close, round_weights

needs_unit = pytest.mark.skipif(
    native_convolved_scan.obstacle() is not None, reason=str(native_convolved_scan.obstacle())
)
STEPS = 3
NETWORKS: dict[str, tuple[Callable[[NeuronFactory], models.Network], tuple[int, ...]]] = {
    "sew-resnet18": (lambda neuron: models.sew_resnet18(3, 2, neuron=neuron), (2, 8, 8)),
    "resnet20": (lambda neuron: models.resnet20(3, 2, neuron=neuron), (2, 8, 8)),
    "vgg": (
        lambda neuron: models.vgg((32, 40, "A", 64), num_classes=3, in_channels=2, image_size=8, neuron=neuron),
        (2, 8, 8),
    ),
}
NEURONS: dict[str, NeuronFactory] = {
    "if": partial(IF, reset="soft"),
    "lif": LIF,
    "plif": PLIF,
    "lifb": partial(LIFB, burst_init=1.5),
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def exact(
    name: str, neuron: str = "lif", precision: Any = "bfloat16"
) -> tuple[models.Network, InferenceNetwork, Tensor]:
    """A network whose sums are exact at any precision, the same for inference, and images."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    network = build(NEURONS[neuron]).eval()
    round_weights(network)
    for layer in network.modules():
        if isinstance(layer, BatchNorm):
            layer.eps = 0.0
            layer.bias.fill_(0.25)
    images = torch.randint(-4, 5, (5, *shape)) / 2
    return network, to_inference(network, precision=precision), images


def apart(fast: InferenceNetwork) -> InferenceNetwork:
    """The same, with two kernels for each pair."""
    fast = copy.deepcopy(fast)
    for chain in fast.modules():
        if type(chain) is ConvolvedChain:
            chain.__class__ = Chain
    return fast


def chains(fast: nn.Module) -> int:
    return sum(type(chain) is ConvolvedChain for chain in fast.modules())


@needs_unit
@pytest.mark.parametrize(
    ("neuron", "precision"),
    [*((neuron, "bfloat16") for neuron in NEURONS), ("if", "int8"), ("lif", "int8"), ("plif", "int8")],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_what_it_did(name: str, neuron: str, precision: str) -> None:
    network, fast, images = exact(name, neuron, precision)
    assert chains(fast) > 0
    close(fast(images, STEPS), network(images, STEPS))
    check_streamed_and_apart(fast, apart(fast), images)


@needs_unit
def test_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution but the encoder, and no neuron but the first, whose input is the same at every step."""
    _, fast, images = exact("sew-resnet18")
    calls: list[dict[str, Any]] = []
    run = native_convolved_scan.PreparedConvolvedScan.__call__
    monkeypatch.setattr(
        native_convolved_scan.PreparedConvolvedScan,
        "__call__",
        lambda *given, **named: calls.append(named) or run(*given, **named),
    )
    fast(images, STEPS)
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in fast.modules())
    assert len(calls) == convolutions - 1
    assert sum(named["added"] is not None for named in calls) == 8  # which send what the shortcut sends, too


@needs_unit
def test_names_stay_and_weights_may_be_written_to() -> None:
    network, fast, images = exact("sew-resnet18")
    other = apart(fast)
    assert list(fast.state_dict()) == list(other.state_dict())
    fast(images, STEPS)
    with torch.no_grad():
        for one in (fast, other):
            conv = one.get_submodule("network.body.layers.3.branch.layers.2.0.0")
            conv.layer.weight.mul_(2)
            conv.layer.bias.add_(0.5)
    close(fast(images, STEPS), other(images, STEPS))
    assert not torch.equal(fast(images, STEPS), network(images, STEPS))


@needs_unit
def test_copies_run_alike() -> None:
    _, fast, images = exact("vgg", precision="int8")
    wanted = fast(images, STEPS)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):  # bytes made right here
        assert chains(other) == chains(fast)
        assert torch.equal(other(images, STEPS), wanted)


@needs_unit
@pytest.mark.parametrize("place", ["0", "0.0", "0.0.layer", "1", "1.neuron"])
def test_hooks_see_what_they_would(place: str) -> None:
    _, fast, images = exact("sew-resnet18")
    wanted = fast(images, STEPS)
    number, *rest = place.split(".")
    path = ["network.body.layers.1.branch.layers", str(int(number)), *(["0"] if number == "0" else []), *rest]
    seen: list[torch.Size] = []
    layer = fast.get_submodule(".".join(path))
    handle = layer.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    if place != "0.0.layer":  # what packs its weights does not call it
        close(fast(images, STEPS), wanted)
        assert len(seen) == 1
    handle.remove()
    assert torch.equal(fast(images, STEPS), wanted)
    assert len(seen) <= 1


def first_pair(fast: nn.Module) -> Pair:
    chain = next(each for each in fast.modules() if type(each) is ConvolvedChain)
    return next(pair for pair in chain.pairs() if pair is not None)


@needs_unit
def test_other_inputs_take_two_kernels() -> None:
    """Single precision, other ranks and devices, also of weights, gradients, no images; other sizes see `pays`."""
    _, fast, _ = exact("vgg")
    pair, spikes = first_pair(fast), torch.ones(STEPS, 2, 32, 8, 8, dtype=torch.bfloat16)
    assert pair.filters_for(spikes) is not None
    for other in (spikes.float(), spikes[0], spikes.to("meta"), spikes[:, :0], spikes[:, :, :16]):
        assert pair.filters_for(other) is None
    with torch.enable_grad():
        assert pair.filters_for(spikes.clone().requires_grad_()) is None
    pair.conv.layer.to("meta")
    assert pair.filters_for(spikes) is None
    pair = first_pair(exact("vgg")[1])
    pair.neuron.is_native = False
    assert pair.filters_for(spikes) is None


@needs_unit
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_streaming_and_parts_of_a_batch_give_the_same(precision: Any) -> None:
    """Where nothing is exact: what runs must not depend on how much comes at once. Logits show a spike more."""
    torch.manual_seed(1)
    network = models.vgg((48, 48, "A", 48), num_classes=10, in_channels=3, image_size=16)
    images = torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        for _ in range(3):
            network.train()(images, 6)
    fast = to_inference(network.eval(), precision=precision)
    whole, state, logits = fast(images, 6), None, []
    for _ in range(6):
        step, state = fast(images, 1, state=state, return_state=True)
        logits.append(step)
    alone = torch.cat([fast(image, 6) for image in images.split(1)], dim=1)
    for found in (torch.cat(logits), alone):
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)  # the readout adds up in another order


@needs_unit
@pytest.mark.parametrize("moved", ["float", "double", "half"])
def test_networks_that_are_cast_do_what_they_did(moved: str) -> None:
    _, fast, images = exact("vgg")
    fast(images, STEPS)
    results = []
    for one in (apart(fast), fast):
        try:
            results.append(getattr(one, moved)()(images, STEPS))
        except RuntimeError as error:
            results.append(str(error))
    assert type(results[0]) is type(results[1])
    assert results[0] == results[1] if isinstance(results[0], str) else torch.equal(results[0], results[1])


@needs_unit
@pytest.mark.parametrize("part", ["1.0.0", "1.0", "1", "2", "2.neuron"])
def test_modules_may_be_replaced(part: str) -> None:
    _, fast, images = exact("vgg")
    other = exact("vgg", "if")[1]  # whose neurons have no leak
    with torch.no_grad():
        for layer in other.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(2)
    before = fast(images, STEPS)
    path = f"network.body.layers.{part}"
    fast.set_submodule(path, other.get_submodule(path))
    after = fast(images, STEPS)
    assert not torch.equal(after, before)
    close(after, apart(fast)(images, STEPS))


@needs_unit
def test_an_unpickled_network_asks_for_the_unit(tmp_path: Path) -> None:
    """Nothing before its first pair does, in a process of its own, which reads what is written right here."""
    torch.manual_seed(0)
    conv = TimeFolded(nn.Conv2d(32, 32, 3, padding=1, bias=False))
    body = Chain(conv, Activation(LIF()), TimeFolded(nn.Flatten(1)))
    fast = to_inference(models.Network(nn.Identity(), body, TimeFolded(nn.Linear(2048, 3))).eval())
    (tmp_path / "network").write_bytes(pickle.dumps(fast))
    code = f"""
import pickle, torch
fast = pickle.load(open({str(tmp_path / "network")!r}, "rb"))
with torch.device("meta"):
    first = fast(torch.ones(2, 4, 32, 8, 8, device="cpu"))
print(list(first.shape), torch.equal(first, fast(torch.ones(2, 4, 32, 8, 8))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[2, 4, 3] True\n"), done.stderr


@needs_unit
def test_states_of_others_are_refused_as_ever() -> None:
    _, fast, images = exact("sew-resnet18")
    _, states = fast(images, 1, return_state=True)
    with pytest.raises(ValueError, match="state"):
        fast(images[:2], 1, state=states)
    with pytest.raises(ValueError, match="neuron states"):
        fast(images, 1, state=states[:-1])


@needs_unit
def test_a_branch_without_a_pair_at_its_end_adds_as_before() -> None:
    """The shortcut, here without neurons, is added to what is pooled behind them."""
    torch.manual_seed(0)

    def block() -> Residual:
        conv = nn.Sequential(TimeFolded(nn.Conv2d(32, 32, 3, padding=1, bias=False)), BatchNorm(32))
        return Residual(Chain(conv, Activation(LIF()), TimeFolded(nn.MaxPool2d(3, 1, 1))), Chain())

    network, _, _ = exact("vgg")
    network.body = Chain(network.body.layers[0], block(), *list(network.body.layers)[1:])  # type: ignore[index, arg-type]
    fast, images = to_inference(network.eval()), torch.randint(-4, 5, (5, 2, 8, 8)) / 2
    assert chains(fast) == 2
    torch.testing.assert_close(fast(images, STEPS), apart(fast)(images, STEPS), rtol=0, atol=0.2)


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_convolved_scan, "obstacle", lambda: "none here")
    network, fast, images = exact("sew-resnet18")
    assert chains(fast) == 0
    close(fast(images, STEPS), network(images, STEPS))


def test_float32_and_other_implementations_have_no_pairs() -> None:
    network, _, _ = exact("vgg")
    assert chains(to_inference(network, precision="float32")) == 0
    assert chains(to_inference(network, implementation="reference")) == 0
