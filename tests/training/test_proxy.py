"""Proxy learning against its chain written by hand, and what it promises: one set of weights, memory without T."""

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ranvier import models
from ranvier.data import Batches, load_digits
from ranvier.models import Network
from ranvier.nn import IF, LIFB, QCFS, BatchNorm, ConvertedIF, Neuron, ProxyActivation, ProxyNorm, analog
from ranvier.training import (
    PUBLISHED_FORM,
    PUBLISHED_LOSS,
    Execution,
    Optimization,
    ProxyForm,
    ProxyLoss,
    fit,
    proxy_network,
)
from ranvier.training.proxy import Target, run_spiking
from ranvier.weights import load, save

CLOSE = {"rtol": 1e-12, "atol": 1e-14}
"""The same float64 formula, summed up in another order."""
SPIKING_OUTPUT = ProxyForm(reset="hard", v_init=0.0, worth="one", clipped=False, readout="spikes", biases=False)

NETWORKS: dict[str, Callable[[Any], Network]] = {
    "mlp": lambda neuron: models.mlp([64, 12, 8, 10], neuron=neuron),
    "vgg": lambda neuron: models.vgg(
        (4, "A", 6, "A"), num_classes=10, in_channels=1, image_size=8, hidden=(7,), neuron=neuron
    ),
    "resnet20": lambda neuron: models.resnet20(in_channels=1, neuron=neuron),
    "sew": lambda neuron: models.sew_resnet18(in_channels=1, neuron=neuron),
}


def batch(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


def network(name: str = "mlp", form: ProxyForm | None = None, neuron: Any = IF) -> Network:
    torch.manual_seed(0)
    return proxy_network(NETWORKS[name](neuron), form)


# Gradient


def spikes_by_hand(currents: list[Tensor], theta: float) -> list[Tensor]:
    """Integrate, fire at the threshold, reset to 0."""
    v, fired = torch.zeros_like(currents[0]), []
    for current in currents:
        v = v + current
        fired.append((v >= theta).to(v.dtype))
        v = v * (1 - fired[-1])
    return fired


@pytest.mark.parametrize("target", ["counts", "rates", "cross_entropy"])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_gradient_is_the_chain_written_by_hand(target: str, steps: int) -> None:
    """dL/dW2 = delta^T a,  dL/dW1 = ((delta W2) [h > 0])^T x:  delta from the spikes, all else from the ANN."""
    torch.manual_seed(0)
    theta, scale, num_classes, size = 0.2, 2.5, 3, 5
    form = replace(SPIKING_OUTPUT, v_threshold=theta, initial_weights="torch")
    model = proxy_network(models.mlp([4, 6, num_classes]), form).double()
    first, second = (parameter.detach().mul_(3) for parameter in model.parameters())
    x, labels = torch.rand(size, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    onehot = torch.eye(num_classes, dtype=torch.float64)[labels]

    hidden = spikes_by_hand([x @ first.T] * steps, theta)
    out = spikes_by_hand([s @ second.T for s in hidden], theta)
    count = torch.stack(out).sum(0)
    assert 0 < count.sum() < steps * count.numel()
    if target == "cross_entropy":
        delta = scale * (torch.softmax(scale * count / steps, 1) - onehot) / size
    else:
        n = count if target == "counts" else count / steps
        delta = 2 * (n - onehot) / (size * num_classes)
    h = x @ first.T
    by_hand = [((delta @ second) * (h > 0)).T @ x, delta.T @ h.relu()]

    loss = ProxyLoss(target, logit_scale=scale, steps_at_once=2)  # type: ignore[arg-type]
    value, outputs = loss(model, x, labels, steps)
    value.backward()
    assert torch.equal(outputs, torch.stack(out).float())
    for parameter, expected in zip(model.parameters(), by_hand, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-8)  # the loss is taken in float32


def test_the_value_is_that_of_the_spiking_network() -> None:
    model, (x, labels) = network(), batch()
    logits = model(x, 4)
    with analog(model):
        ann = model(x, 1)
    value, outputs = ProxyLoss("cross_entropy", logit_scale=3.0)(model, x, labels, 4)
    assert torch.equal(outputs, logits)
    assert torch.equal(value, nn.functional.cross_entropy(3 * logits.mean(0), labels))
    assert not torch.equal(value, nn.functional.cross_entropy(3 * ann[0], labels))


@pytest.mark.parametrize(("rectification", "passes"), [(False, True), (True, False)])
def test_no_gradient_passes_an_activation_above_its_ceiling(rectification: bool, passes: bool) -> None:
    form = replace(SPIKING_OUTPUT, clipped=rectification, v_threshold=1.0)
    model = proxy_network(models.mlp([1, 1, 2]), form)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(5.0)
    value, _ = ProxyLoss("counts")(model, torch.ones(1, 1), torch.tensor([0]), 2)
    value.backward()
    first, second = model.parameters()
    assert first.grad is not None
    assert bool(first.grad.any()) is passes
    assert second.grad is not None
    assert bool(second.grad.any())


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        # Differences 1 - 0.75 and 3 - 0.25, squared: 0.0625 and 7.5625; their mean.
        ("counts", 3.8125),
        ("rates", 3.8125),
        # -(0.75 log softmax_0 + 0.25 log softmax_1) of the logits (0.5, 1.5).
        ("cross_entropy", 0.75 * math.log(1 + math.e) + 0.25 * math.log(1 + math.exp(-1))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_are_the_shares_of_a_spike(target: Target, expected: float, dtype: torch.dtype) -> None:
    value = ProxyLoss(target, logit_scale=0.5).of_outputs(
        torch.tensor([[1.0, 3.0]]), torch.tensor([[0.75, 0.25]], dtype=dtype)
    )
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-6)  # float32


@pytest.mark.parametrize("target", ["counts", "rates", "cross_entropy"])
def test_one_hot_probabilities_mean_the_class(target: Target) -> None:
    model, (x, labels) = network(), batch()
    onehot = nn.functional.one_hot(labels, model(x, 1).shape[2]).float()
    soft, hard = (ProxyLoss(target)(model, x, given, 4)[0] for given in (onehot, labels))
    torch.testing.assert_close(soft, hard)  # float32


@pytest.mark.parametrize("labels", [torch.tensor([2]), torch.tensor([[0.5, 0.4]]), torch.tensor([[1.0]])])
def test_labels_that_do_not_fit_are_refused(labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"label 2 at index 0|sum to 0\.9|labels have shape \[1, 1\]"):
        ProxyLoss("counts").of_outputs(torch.zeros(1, 2), labels)


def test_sequences_show_the_ann_their_mean() -> None:
    model, (x, labels) = network(), batch()
    frames = torch.stack([x, x.flip(0), -x])
    with analog(model):
        ann = model(frames.mean(0), 1)[0]
    seen: list[Tensor] = []
    model.readout.register_forward_hook(lambda *call: seen.append(call[2]))
    _, outputs = ProxyLoss(steps_at_once=2)(model, frames, labels, None)
    assert torch.equal(seen[-1][0], ann)
    torch.testing.assert_close(outputs, model(frames))


# One network, two modes


@pytest.mark.parametrize("form", [None, PUBLISHED_FORM], ids=["improved", "published"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient_and_nothing_of_the_old_neurons_is_left(
    name: str, form: ProxyForm | None
) -> None:
    model = network(name, form, neuron=LIFB)
    x, labels = batch()
    value, outputs = ProxyLoss("rates")(model, x, labels, 3)
    value.backward()
    assert outputs.shape == (3, 6, 10)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    kind = IF if form else ConvertedIF
    assert {type(module) for module in model.modules() if isinstance(module, Neuron)} == {kind}
    assert {type(module) for module in model.modules() if isinstance(module, BatchNorm)} <= {ProxyNorm}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_analog_mode_is_the_same_network_with_relu(name: str) -> None:
    """With the weights that it came with, and whatever neurons: the surgery changes nothing else."""
    torch.manual_seed(0)
    ann = NETWORKS[name](lambda channels: nn.ReLU())
    model = proxy_network(ann, ProxyForm(clipped=False))
    x, _ = batch()
    for training in (True, False):
        ann.train(training)
        model.train(training)
        with analog(model):
            torch.testing.assert_close(model(x, 1), ann(x, 1))
    other = proxy_network(NETWORKS[name](QCFS), ProxyForm(clipped=False)).eval()
    with analog(other):
        assert other(x, 1).shape == (1, 6, 10)


def test_many_steps_approach_the_ann() -> None:
    """Why the proxy is one: with clipped activations the modes differ by less than 1/T of what weights can amplify."""
    model, (x, _) = network("mlp", ProxyForm(clipped=True)).double(), batch()
    x = x.double()
    model.requires_grad_(False)
    with analog(model):
        ann = model(x, 1)[0]
    errors = [float((model(x, steps).mean(0) - ann).abs().max()) for steps in (4, 256)]
    assert errors[1] < errors[0] / 8


def test_the_given_network_is_not_modified() -> None:
    given = NETWORKS["vgg"](LIFB)
    before = copy.deepcopy(given.state_dict())
    made = proxy_network(given, PUBLISHED_FORM)
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())
    assert not {id(p) for p in given.parameters()} & {id(p) for p in made.parameters()}


def test_what_published_means() -> None:
    model = network("vgg", PUBLISHED_FORM)
    assert all(not name.endswith("bias") or "1.bias" in name for name, _ in model.named_parameters())
    assert not any(isinstance(module, nn.AvgPool2d) for module in model.modules())
    neurons = [module for module in model.modules() if isinstance(module, IF)]
    assert len(neurons) == 4  # two convolutions, a hidden layer, and the output
    assert {(neuron.params.v_threshold, neuron.params.reset) for neuron in neurons} == {(2.0, "hard")}
    kept_apart = [module.separate for module in model.modules() if isinstance(module, ProxyNorm)]
    assert kept_apart == [False, True]  # before the first neuron both modes see the same
    x, _ = batch()
    assert set(model(10 * x, 15).unique().tolist()) <= {0.0, 1.0}
    assert (PUBLISHED_LOSS.target, PUBLISHED_LOSS.freeze_epoch) == ("counts", 1)


def test_weights_are_one_tensor_wherever_they_go(tmp_path: Path) -> None:
    model, (x, _) = network("vgg"), batch()
    names = [name for name, _ in model.named_parameters()]
    ann = NETWORKS["vgg"](lambda channels: nn.ReLU())
    assert sorted(p.numel() for p in model.parameters()) == sorted(p.numel() for p in ann.parameters())
    save(model, tmp_path / "model.safetensors")
    loaded = network("vgg")
    for parameter in loaded.parameters():
        nn.init.zeros_(parameter)
    load(loaded, tmp_path / "model.safetensors")
    for moved in (model, loaded, copy.deepcopy(model), copy.deepcopy(model).to("cpu").double().float()):
        assert [name for name, _ in moved.named_parameters()] == names
        moved.eval()
        with torch.no_grad():
            for parameter in moved.parameters():  # what changes one mode changes the other
                before = moved(x, 4)
                with analog(moved):
                    analog_before = moved(x, 1)
                kept = parameter.clone()
                parameter.copy_(torch.randn_like(parameter) * 3)
                assert not torch.equal(moved(x, 4), before)
                with analog(moved):
                    assert not torch.equal(moved(x, 1), analog_before)
                parameter.copy_(kept)
            assert torch.equal(moved(x, 4), model.eval()(x, 4))


# Memory and steps


@pytest.mark.parametrize("form", [None, replace(PUBLISHED_FORM, v_threshold=0.125)], ids=["improved", "published"])
@pytest.mark.parametrize("steps_at_once", [1, 2, 3, 7, 100])
def test_how_many_steps_are_run_at_once_changes_nothing(steps_at_once: int, form: ProxyForm | None) -> None:
    model = network("vgg", form).double()
    x = batch()[0].double()
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    expected = run_spiking(whole, x, 7, steps_at_once=7)
    assert len(expected.unique(dim=0)) > 1, "the network is silent: this test would show nothing"
    torch.testing.assert_close(run_spiking(parts, x, 7, steps_at_once), expected, **CLOSE)
    for one, two in zip(parts.buffers(), whole.buffers(), strict=True):  # statistics are learned step by step
        torch.testing.assert_close(one, two, **CLOSE)


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made within."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("form", [None, PUBLISHED_FORM], ids=["improved", "published"])
@pytest.mark.parametrize("build", [models.conv4, models.resnet20])
def test_memory_does_not_grow_with_the_number_of_steps(build: Callable[..., Network], form: ProxyForm | None) -> None:
    model = proxy_network(build(10, 1), form)
    x, labels = torch.rand(2, 1, 28, 28), torch.tensor([0, 1])

    def peak(loss: ProxyLoss, steps: int) -> int:
        with PeakMemory() as memory:
            loss(model, x, labels, steps)[0].backward()
        model.zero_grad(set_to_none=True)
        return memory.peak

    at_4, at_64 = peak(ProxyLoss(), 4), peak(ProxyLoss(), 64)
    assert at_64 <= 1.1 * at_4
    assert peak(ProxyLoss(steps_at_once=64), 64) > 2 * at_4  # what is measured can grow


def test_evaluation_is_not_changed_by_a_training_step() -> None:
    """The mode is that of the call: outside of the loss the network spikes."""
    model, (x, labels) = network(), batch()
    before = model(x, 4)
    ProxyLoss()(model, x, labels, 4)
    assert torch.equal(model(x, 4), before)


# Training

QUICK = Execution(precision="float32", implementation="reference", device="cpu", checkpoint_seconds=0)


class Interrupt(Exception):
    """Stands for the process dying."""


class DyingLoss(ProxyLoss):
    """A loss that ends the run after some updates."""

    lives: list[int] = [-1]  # noqa: RUF012 - counted down by a frozen dataclass

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        if self.lives[0] == 0:
            raise Interrupt
        self.lives[0] -= 1
        return super().__call__(*arguments)


def train(out: Path | None, loss: ProxyLoss, *, seed: int = 0, resume: bool = False) -> Network:
    torch.manual_seed(seed)
    form = ProxyForm(normalization="separate")
    model = proxy_network(NETWORKS["vgg"](IF), form)
    splits = load_digits()
    _, few = splits.train.hold_out(128, seed=0)
    fit(
        model, loss, Batches(few, 32, shuffle=True, drop_last=True), Batches(splits.test, 200), epochs=3, steps=3,
        optimization=Optimization(lr=1e-2), execution=QUICK, out=out, resume=resume, quiet=True,
    )  # fmt: skip
    return model


@pytest.mark.parametrize("lives", [2, 4, 6, 9])
def test_interrupted_anywhere_resumes_with_its_normalisation_frozen(tmp_path: Path, lives: int) -> None:
    loss = ProxyLoss("rates", freeze_epoch=1)
    undisturbed = train(None, loss)
    dying = DyingLoss("rates", freeze_epoch=1)
    dying.lives[0] = lives
    with pytest.raises(Interrupt):
        train(tmp_path, dying)
    resumed = train(tmp_path, loss, seed=9, resume=True)
    for (name, one), two in zip(undisturbed.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_normalisation_freezes_at_its_epoch() -> None:
    model = network("vgg", ProxyForm(normalization="separate"))
    norms = [module for module in model.modules() if isinstance(module, ProxyNorm)]
    loss = ProxyLoss(freeze_epoch=2)
    for epoch, frozen in ((0, False), (1, False), (2, True), (5, True)):
        model.train()
        loss.begin_epoch(model, epoch)
        assert [not norm.training for norm in norms] == [frozen] * len(norms)
        assert model.training
    before = copy.deepcopy(model.state_dict())
    x, labels = batch()
    loss(model, x, labels, 3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.train()
    ProxyLoss().begin_epoch(model, 1000)
    assert all(norm.training for norm in norms)


def test_training_learns() -> None:
    torch.manual_seed(0)
    splits = load_digits()
    model = proxy_network(models.mlp([64, 32, 10]))
    progress = fit(
        model, ProxyLoss(), Batches(splits.train, 64, shuffle=True, drop_last=True), Batches(splits.test, 300),
        epochs=12, steps=2, optimization=Optimization(lr=5e-3), execution=replace(QUICK, checkpoint_seconds=60),
        quiet=True,
    )  # fmt: skip
    assert progress.history[-1]["accuracy"][-1] > 0.8  # chance is 0.1


# Measures and errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reset": "hard"}, "discards what exceeds"),
        ({"reset": "hard", "v_init": 0.0, "worth": "threshold"}, "discards what exceeds"),
        ({"reset": "medium"}, "reset is 'medium'"),
        ({"v_threshold": 0.0}, "v_threshold is 0"),
        ({"v_init": 1.0}, "v_init is 1.0"),
        ({"worth": "two"}, "worth"),
        ({"readout": "spike"}, "readout"),
        ({"normalization": "none"}, "normalization"),
        ({"pooling": "sum"}, "pooling"),
        ({"initial_weights": "zero"}, "initial_weights"),
    ],
)
def test_forms_that_cannot_be_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProxyForm(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"target": "count"}, {"logit_scale": 0.0}, {"freeze_epoch": -1}, {"steps_at_once": 0}]
)
def test_losses_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ProxyLoss(**wrong)


def test_networks_without_two_modes_are_refused() -> None:
    x, labels = batch()
    for model in (NETWORKS["mlp"](IF), lambda images, steps: images):
        with pytest.raises(ValueError, match=r"proxy_network\(network\)"):
            ProxyLoss()(model, x, labels, 2)
    with pytest.raises(TypeError, match="network is a Linear"):
        proxy_network(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_activations_are_found_in_any_block() -> None:
    model = network("resnet20")
    assert all(type(site) is ProxyActivation for site in model.modules() if hasattr(site, "neuron"))
