"""The neuron of foreign files as a module: numbers of its own for each neuron, nothing remembered."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ranvier import dynamics, evaluation, models
from ranvier.dynamics import AffineParams, ATan, NeuronState
from ranvier.nn import LIF, AffineIF, Neuron
from ranvier.provenance import cpp_compiler

SHAPE = (3, 5)


def random_current(steps: int = 4, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(steps, batch, *SHAPE, generator=torch.Generator().manual_seed(seed)) + 0.4


def numbers(seed: int = 0) -> dict[str, Tensor]:
    """A value for each neuron of everything."""
    generator = torch.Generator().manual_seed(seed)
    tau, r, v_leak, v_threshold, v_reset = torch.rand(5, *SHAPE, generator=generator)
    return {
        "tau": 1 + tau,
        "r": 1 + r,
        "v_leak": v_leak,
        "v_threshold": 0.2 + v_threshold,
        "v_reset": v_reset - 0.5,
    }


KINDS: dict[str, dict[str, Any]] = {
    "LIF": {},
    "IF": {"tau": None},
    "LI": {"fires": False},
    "I": {"tau": None, "fires": False},
    "soft": {"reset": "soft", "ties_fire": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str) -> AffineIF:
    return AffineIF(**{**numbers(), **KINDS[kind]})


@every_kind
def test_runs_its_scan_with_its_numbers(kind: str) -> None:
    neuron, current = build(kind), random_current()
    given = KINDS[kind]
    params = AffineParams(
        leaky="tau" not in given,
        ties_fire=given.get("ties_fire", False),
        reset=given.get("reset", "hard"),
        fires=given.get("fires", True),
    )
    assert neuron.params == params
    expected, end = dynamics.affine_scan(current, None, params, *numbers().values())
    sent, state = neuron(current, return_state=True)
    assert torch.equal(sent, expected)
    assert torch.equal(state.v, end.v)
    if params.fires:
        assert 0 < sent.mean() < 1


@every_kind
def test_calls_do_not_know_of_each_other(kind: str) -> None:
    neuron, current = build(kind), random_current()
    before = dict(vars(neuron))
    first = neuron(current)
    neuron(random_current(batch=7, seed=1), return_state=True)
    assert torch.equal(neuron(current), first)
    assert vars(neuron) == before


@every_kind
def test_streaming_equals_one_call_bit_for_bit(kind: str) -> None:
    neuron, current = build(kind), random_current(steps=6)
    whole, end = neuron(current, return_state=True)
    state = None
    for t in range(6):
        sent, state = neuron(current[t : t + 1], state, return_state=True)
        assert torch.equal(sent[0], whole[t])
    assert isinstance(state, NeuronState)
    assert torch.equal(state.v, end.v)


@pytest.mark.parametrize("kind", ["LIF", "I"])
def test_compiled_equals_the_reference(kind: str) -> None:
    """Numbers of exact halves, so that fused operations cannot move a spike."""
    if cpp_compiler() is None:
        pytest.skip("torch.compile needs a C++ compiler: apt-get install g++")
    given = {name: (8 * value).round() / 8 for name, value in numbers().items()}
    given["tau"] = torch.full(SHAPE, 2.0)
    current = (64 * random_current()).round() / 64
    results = [
        AffineIF(**{**given, **KINDS[kind]}, implementation=implementation)(current, return_state=True)
        for implementation in ("reference", "compiled")
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1].v, results[1][1].v)


def test_state_of_another_batch_size_raises() -> None:
    neuron = build("LIF")
    _, state = neuron(random_current(batch=4), return_state=True)
    with pytest.raises(ValueError, match=r"state\.v has shape \[4, 3, 5\] but current is \[4, 2, 3, 5\].*state=None"):
        neuron(random_current(batch=2), state)


def test_numbers_are_buffers_that_move_and_are_saved_and_nothing_trains() -> None:
    neuron = build("LIF")
    assert not list(neuron.parameters())
    assert list(neuron.state_dict()) == ["tau", "r", "v_leak", "v_threshold", "v_reset"]
    other = AffineIF(**{**numbers(), **numbers(seed=1)})
    other.load_state_dict(neuron.state_dict())
    current = random_current()
    for same in (other, copy.deepcopy(neuron)):
        assert torch.equal(same(current), neuron(current))
    doubled = neuron.double()
    assert doubled.tau.dtype == torch.float64
    assert doubled(current.double(), return_state=True)[1].v.dtype == torch.float64


def test_numbers_are_copies_of_what_came() -> None:
    given = numbers()
    neuron = AffineIF(**given)
    given["v_threshold"].fill_(100.0)
    assert neuron(random_current()).sum() > 0
    neuron.tau.fill_(3.0)
    assert not (given["tau"] == 3.0).any()


def test_gradients_reach_the_input_and_calls_do_not_share_a_graph() -> None:
    neuron, current = build("LIF"), random_current().requires_grad_()
    gradients = [torch.autograd.grad(neuron(current).sum(), current)[0] for _ in range(2)]
    assert torch.equal(*gradients)
    assert (gradients[0] != 0).any()
    again = torch.autograd.grad(checkpoint(neuron, current, use_reentrant=False).sum(), current)[0]
    assert torch.equal(again, gradients[0])


def test_autocast_keeps_the_potential() -> None:
    neuron, current = build("LIF"), random_current().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        spikes, state = neuron(current, return_state=True)
    assert spikes.dtype == torch.bfloat16
    assert state.v.dtype == torch.float32
    assert torch.equal(spikes, neuron(current.float()).bfloat16())


def test_instances_are_freed() -> None:
    neuron = build("LIF")
    neuron(random_current())
    alive = weakref.ref(neuron)
    del neuron
    gc.collect()
    assert alive() is None


def test_as_built_it_is_lif_but_for_ties() -> None:
    current = random_current()
    assert torch.equal(AffineIF()(current), LIF()(current))
    tie = torch.ones(1, 1, 1)
    assert LIF()(tie).item() == AffineIF(ties_fire=True)(tie).item() == 1
    assert AffineIF()(tie).item() == 0


def test_models_build_and_watch_it() -> None:
    torch.manual_seed(0)
    model = models.mlp([4, 8, 3], neuron=AffineIF)
    images = torch.rand(5, 4)
    _, state = model(images, 2, return_state=True)
    assert torch.equal(model(images, 1, state=state)[0], model(images, 3)[2])
    spikes = evaluation.record_spikes(model, images, 3)
    assert spikes["body.layers.0.neuron"].shape == (3, 5, 8)
    compiled: nn.Module = model.body.layers[0].neuron  # type: ignore[union-attr, assignment]
    assert isinstance(compiled, Neuron)


@pytest.mark.parametrize("tau", [0.99, 0.0, -1.0, float("nan"), torch.tensor([2.0, 0.5])])
def test_time_constants_below_one_step_raise(tau: float | Tensor) -> None:
    with pytest.raises(ValueError, match=r"tau is .* steps for some neuron, but must be at least 1"):
        AffineIF(tau=tau)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"reset": "none"}, ValueError, "reset is 'none'"),
        ({"implementation": "fast"}, ValueError, "implementation is 'fast'"),
        ({"num_channels": 2.0}, TypeError, "channel count"),
    ],
)
def test_bad_settings_raise_when_built(given: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        AffineIF(**given)


def test_input_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"current has shape \[2, 1, 3, 6\], but the neurons are \[3, 5\]"):
        build("LIF")(torch.zeros(2, 1, 3, 6))


@pytest.mark.parametrize(
    ("neuron", "expected"),
    [
        (
            AffineIF(surrogate=ATan(1.0)),
            "tau=2, r=1, v_leak=0, v_threshold=0.5, v_reset=0, leaky=True, ties_fire=False, reset=hard, fires=True, "
            "surrogate=ATan(alpha=1.0)",
        ),
        (
            AffineIF(tau=None, r=torch.ones(2, 3), fires=False),
            "r=[2, 3], leaky=False, ties_fire=False, reset=hard, fires=False, surrogate=Triangle(width=0.5)",
        ),
    ],
    ids=["LIF", "I"],
)
def test_printed_form(neuron: AffineIF, expected: str) -> None:
    assert repr(neuron) == f"AffineIF({expected})"


def test_neurons_that_send_spikes() -> None:
    assert [neuron.fires for neuron in (LIF(), AffineIF(), AffineIF(fires=False))] == [True, True, False]
