"""The stream: each sample runs until the network is sure of it, as the rule says on one call of all steps."""

import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ranvier import models
from ranvier.evaluation import Answers, run_until_confident
from ranvier.evaluation.streaming import Measure
from ranvier.kernels import dispatch
from ranvier.nn import LIF, LIFB, BatchNorm

from .streams import (
    MEASURES,
    NETWORKS,
    STEPS,
    TOLD,
    Broken,
    NoState,
    NoStateReturned,
    Told,
    build,
    every_measure,
    medium,
    rule,
)


@pytest.fixture(autouse=True)
def _reference_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run neurons by their reference at every size: compiling takes long, and the stream is what is compared."""
    monkeypatch.setattr(dispatch, "SMALL", sys.maxsize)


def test_measures_by_hand() -> None:
    """Probabilities 0.6, 0.3, 0.1 after the first step."""
    shares = torch.tensor([0.6, 0.3, 0.1])
    image = torch.stack([shares.log(), torch.tensor([0.0, 0.0, 50.0])]).unsqueeze(0)
    entropy = -sum(p * math.log(p) for p in shares.tolist())
    for measure, sure in zip(MEASURES, (0.6, 0.3, 1 - entropy / math.log(3)), strict=True):
        for threshold, steps in ((sure - 1e-6, 1), (sure + 1e-6, 2)):
            assert run_until_confident(Told(), image, 2, threshold, measure=measure).steps.tolist() == [steps]


def test_temperature_divides_the_logits() -> None:
    """A lead of 3 at temperature 2 is one of 1.5."""
    sure = 1 / (1 + math.exp(-1.5))
    for threshold, steps in ((sure - 1e-6, 1), (sure + 1e-6, 2)):
        assert run_until_confident(Told(), TOLD[:1], 2, threshold, temperature=2.0).steps.tolist() == [steps]


@every_measure
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_stream_equals_the_rule_on_one_call_bit_for_bit(name: str, sequence: bool, measure: Measure) -> None:
    network, images = build(name)
    inputs = torch.stack([images.roll(t, 0) for t in range(STEPS)]) if sequence else images
    with torch.no_grad():
        logits = network(inputs, STEPS)
    assert len(logits.unique(dim=0)) == STEPS, "the network is silent: this test would show nothing"
    threshold = medium(network, images, measure)
    steps, means = rule(logits, threshold, measure)
    assert len(steps.unique()) > 1, "all samples stop at once: this test would show nothing"
    answers = run_until_confident(network, inputs, STEPS, threshold, measure=measure)
    assert torch.equal(answers.steps, steps)
    assert torch.equal(answers.logits, means)
    assert torch.equal(answers.predictions, means.argmax(-1))
    alone = [
        run_until_confident(network, inputs[:, b : b + 1] if sequence else inputs[b : b + 1], STEPS, threshold,
                            measure=measure) for b in range(4)
    ]  # fmt: skip
    assert torch.equal(torch.cat([one.logits for one in alone]), means[:4])
    assert torch.equal(torch.cat([one.steps for one in alone]), steps[:4])


@pytest.mark.parametrize("name", ["spikformer", "sew_resnet18"])
def test_untrained_networks_in_float64(name: str) -> None:
    """Rounding of 1e-16 moves no spike here, and no sample across the threshold."""
    torch.manual_seed(3)
    if name == "spikformer":
        network, size = models.spikformer(10, 3, image_size=16, depth=1, dim=32, heads=2), 16
    else:
        network, size = models.sew_resnet18(10, 3, neuron=LIFB), 8
    network = network.double()
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.randn(2, 8, 3, size, size, dtype=torch.float64))  # or deep layers would be silent
    network.eval()
    images = torch.randn(8, 3, size, size, dtype=torch.float64)
    threshold = medium(network, images)
    with torch.no_grad():
        steps, means = rule(network(images, 4), threshold)
    answers = run_until_confident(network, images, 4, threshold)
    assert torch.equal(answers.steps, steps)
    torch.testing.assert_close(answers.logits, means, rtol=1e-9, atol=1e-9)


def test_reduced_precision_agrees_with_its_own_run() -> None:
    network, images = build("lif")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = network(images, STEPS)
        answers = run_until_confident(network, images, STEPS, 0.9)
    assert logits.dtype is torch.bfloat16
    steps, means = rule(logits, 0.9)
    assert torch.equal(answers.steps, steps)
    torch.testing.assert_close(answers.logits, means, rtol=1e-6, atol=1e-7)  # sums are rounded to float32


def test_stopped_samples_leave_the_batch() -> None:
    """One stops at step 2, two at once at step 3, and the last runs to the end although it is never sure."""
    rounds = torch.zeros(4, 5, 2)
    rounds[0, 1:, 0], rounds[1:3, 2:, 0] = 9.0, 9.0
    sizes = []

    class Counting(Told):
        def forward(self, images: Tensor, steps: int, **arguments: Any) -> Any:
            sizes.append(len(images))
            return super().forward(images, steps, **arguments)

    answers = run_until_confident(Counting(), rounds, 5, 0.9)
    assert sizes == [4, 4, 3, 1, 1]
    assert answers.steps.tolist() == [2, 3, 3, 5]
    assert answers.logits[:, 0].tolist() == [4.5, 3.0, 3.0, 0.0]
    sizes.clear()
    assert run_until_confident(Counting(), rounds, 5, 0.0).steps.tolist() == [1, 1, 1, 1]
    assert sizes == [4]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: sizes that depend on values, and values one by one.

    Not `tolist`, which on a CPU passes no dispatcher: the check of finite numbers at the end, in place of the count of
    samples that are left after the last step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype is torch.bool for index in args[1] if index is not None
        )
        self.count += masked or name in ("nonzero", "masked_select", "_local_scalar_dense", "is_nonzero", "unique")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("threshold", "most"), [(0.0, 1), (0.9, 4), (math.inf, 4)])
def test_the_device_is_waited_for_once_a_step(threshold: float, most: int) -> None:
    network, images = build("converted_signed")
    with Waits() as waits:
        steps = run_until_confident(network, images, STEPS, threshold).steps
    assert waits.count <= min(most, steps.max())


# --- states ------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    seen: Tensor
    step: int


@dataclass(frozen=True)
class Record:
    seen: Tensor
    name: str
    nothing: None = None


STATES: dict[str, Any] = {
    "named_tuple": (lambda seen, step: (Pair(seen, step), Pair(seen, step)), lambda state: state[1]),
    "dataclass": (lambda seen, step: [Record(seen, "a"), step], lambda state: (state[0].seen, state[1])),
    "dictionary": (lambda seen, step: {"seen": seen, "n": {"step": step}}, lambda s: (s["seen"], s["n"]["step"])),
    "counter_as_tensor": (lambda seen, step: (seen, torch.tensor(step)), lambda state: (state[0], int(state[1]))),
    "empty_tensor": (lambda seen, step: (seen, step, torch.empty(0)), lambda state: state[:2]),
}


class Remembers(nn.Module):
    """Reads its logits from its state alone: the image is looked at in the first step only."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.pack, self.unpack = STATES[kind]

    def forward(self, images: Tensor, steps: int, *, state: Any = None, return_state: bool = False) -> Any:
        seen, start = (images, 0) if state is None else self.unpack(state)
        logits = seen[:, start : start + steps].transpose(0, 1)
        return (logits, self.pack(seen, start + steps)) if return_state else logits


@pytest.mark.parametrize("kind", STATES)
def test_states_of_any_make(kind: str) -> None:
    images = torch.randn(40, 5, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 6.0).unsqueeze(1)
    steps, means = rule(images.transpose(0, 1), 0.7)
    assert len(steps.unique()) > 2
    answers = run_until_confident(Remembers(kind), images, 5, 0.7)
    assert torch.equal(answers.steps, steps)
    torch.testing.assert_close(answers.logits, means, rtol=1e-6, atol=1e-6)  # means here are not rounded to float32


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (torch.zeros(3, 4), ValueError, r"tensor of shape \[3, 4\], but the batch has 4 samples.*first axis"),
        ({1, 2}, TypeError, "holds a set, of which samples cannot be taken"),
    ],
)
def test_states_that_cannot_be_split(state: Any, error: type[Exception], message: str) -> None:
    class Odd(Told):
        def forward(self, images: Tensor, steps: int, **arguments: Any) -> Any:
            return super().forward(images, steps, return_state=True)[0], state

    with pytest.raises(error, match=message):
        run_until_confident(Odd(), TOLD, 2, 0.9)


# --- arguments ---------------------------------------------------------------------------------------------------


def test_sequences() -> None:
    network, images = build("lif")
    frames = torch.stack([images.roll(t, 0) for t in range(STEPS)])
    whole = run_until_confident(network, frames, None, 0.99)
    assert torch.equal(whole.logits, run_until_confident(network, frames, STEPS, 0.99).logits)
    first = run_until_confident(network, frames, 3, math.inf)
    assert torch.equal(first.logits, run_until_confident(network, frames[:3], None, math.inf).logits)
    with pytest.raises(ValueError, match=r"a sequence of 5 steps, but steps=6\. Pass longer sequences, or steps=5"):
        run_until_confident(network, frames, 6, 0.9)


def test_a_network_without_ranks_takes_a_sequence_where_steps_are_open() -> None:
    class Sums(nn.Module):
        """Logits are the frame."""

        def forward(self, images: Tensor, steps: int, *, state: Any = None, return_state: bool = False) -> Any:
            return images.unsqueeze(0), ()

    frames = torch.tensor([[[1.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [0.0, 0.0]]])
    assert run_until_confident(Sums(), frames, None, 0.9).steps.tolist() == [2, 1]


def test_constant_input_needs_steps() -> None:
    network, images = build("lif")
    with pytest.raises(ValueError, match=r"Pass it: model\(images, steps=4\)"):
        run_until_confident(network, images, None, 0.9)


@pytest.mark.parametrize(
    ("model", "came"), [(NoState(), r"takes \(images, steps\)"), (NoStateReturned(), "returned a Tensor")]
)
def test_networks_that_do_not_stream(model: nn.Module, came: str) -> None:
    with pytest.raises(TypeError, match=rf"forward {came}, but .* return_state=True\) must return logits"):
        run_until_confident(model, TOLD, 2, 0.9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    for threshold in (0.0, 0.9):
        with pytest.raises(ValueError, match="logits of these images hold NaN or infinity.*diverged"):
            run_until_confident(Broken(value), TOLD, 2, threshold)


def test_images_that_are_not_finite() -> None:
    network, images = build("lif")
    images[3, 0] = math.nan
    with pytest.raises(ValueError, match=r"these images hold NaN or infinity\. Mend the data"):
        run_until_confident(network, images, STEPS, 0.9)


def test_wrong_arguments_of_the_stream() -> None:
    for arguments, message in (
        ({"threshold": math.nan}, "threshold is NaN"),
        ({"threshold": 0.5, "measure": "variance"}, "measure is 'variance'"),
        ({"threshold": 0.5, "temperature": -1.0}, "temperature is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            run_until_confident(Told(), TOLD, 2, **arguments)
    with pytest.raises(ValueError, match="steps is 0"):
        run_until_confident(Told(), TOLD, 0, 0.5)
    with pytest.raises(ValueError, match=r"shape \[0, 2, 2\]: no samples"):
        run_until_confident(Told(), TOLD[:0], 2, 0.5)
    with pytest.raises(TypeError, match="a network takes a floating torch.Tensor"):
        run_until_confident(Told(), TOLD.numpy(), 2, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least K = 2 classes"):
        run_until_confident(Told(), TOLD[..., :1], 2, 0.5)


def test_runs_in_eval_mode_and_puts_each_module_back() -> None:
    network = models.conv4(3, 2, image_size=8).train()
    network.encoder.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = []
    neuron = next(module for module in network.modules() if isinstance(module, LIF))
    neuron.register_forward_hook(lambda *_: modes.append((network.training, torch.is_inference_mode_enabled())))
    run_until_confident(network, torch.randn(4, 2, 8, 8), 2, 0.5)
    assert set(modes) == {(False, True)}
    assert (network.training, network.body.training, network.encoder.training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_answers_unpack() -> None:
    answers = Answers(torch.tensor([[0.0, 2.0, 2.0]]), torch.tensor([3]))
    logits, steps = answers
    assert (logits.shape, steps.tolist(), answers.predictions.tolist()) == ((1, 3), [3], [1])
