"""Neuron modules: parameters in, spikes out, nothing remembered."""

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ranvier import dynamics, kernels
from ranvier.dynamics import ATan, IFParams, LIFBParams, LIFPairParams, LIFParams, NeuronState, PLIFParams, Triangle
from ranvier.nn import IF, LIF, LIFB, PLIF, LIFPair, Neuron
from ranvier.provenance import cpp_compiler

CHANNELS = 3
NEURONS = (IF, LIF, PLIF, LIFB, LIFPair)
every_neuron = pytest.mark.parametrize("neuron", NEURONS)


def random_current(steps: int = 4, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(steps, batch, CHANNELS, 5, generator=torch.Generator().manual_seed(seed)) + 0.4


@every_neuron
def test_calls_do_not_know_of_each_other(neuron: type[nn.Module]) -> None:
    """No reset to be forgotten: the second call, and one with another batch size, start from rest."""
    module, other = neuron(CHANNELS), neuron(CHANNELS)
    current = random_current()
    first = module(current)
    assert 0 < (first != 0).float().mean() < 1
    other(random_current(seed=1))
    module(random_current(batch=7, seed=2))
    assert torch.equal(module(current), first)
    assert torch.equal(other(current), first)


@every_neuron
def test_training_steps_do_not_share_a_graph(neuron: type[nn.Module]) -> None:
    """State kept from the last batch would make the second backward pass run through a freed graph."""
    module = neuron(CHANNELS)
    current = random_current().requires_grad_()
    gradients = []
    for _ in range(2):
        (gradient,) = torch.autograd.grad(module(current).sum(), current)
        gradients.append(gradient)
    assert torch.equal(*gradients)
    assert (gradients[0] != 0).any()


@pytest.mark.parametrize(
    ("neuron", "names"), [(IF, set()), (LIF, set()), (PLIF, {"decay"}), (LIFB, {"strength"}), (LIFPair, set())]
)
def test_state_dict_holds_parameters_only(neuron: type[nn.Module], names: set[str]) -> None:
    module = neuron(CHANNELS)
    module(random_current())
    module(random_current(), return_state=True)
    assert set(module.state_dict()) == names
    assert not list(module.buffers())


@every_neuron
def test_attributes_do_not_change_by_running(neuron: type[nn.Module]) -> None:
    module = neuron(CHANNELS)
    before = dict(vars(module))
    module(random_current(), return_state=True)
    assert vars(module) == before


@every_neuron
def test_instances_are_freed(neuron: type[nn.Module]) -> None:
    """No list of all neurons ever built keeps them alive."""
    module = neuron(CHANNELS)
    module(random_current())
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None


@every_neuron
def test_streaming_equals_one_call_bit_for_bit(neuron: type[nn.Module]) -> None:
    module = neuron(CHANNELS)
    current = random_current(steps=6)
    whole, end = module(current, return_state=True)
    state = None
    for t in range(6):
        spikes, state = module(current[t : t + 1], state, return_state=True)
        assert torch.equal(spikes[0], whole[t])
    assert isinstance(state, NeuronState)
    assert torch.equal(state.v, end.v)
    assert torch.equal(module(current[3:], module(current[:3], return_state=True)[1]), whole[3:])


@every_neuron
def test_state_of_another_batch_size_raises(neuron: type[nn.Module]) -> None:
    """Neither zeroed in silence nor filled up with other rows."""
    module = neuron(CHANNELS)
    _, state = module(random_current(batch=4), return_state=True)
    message = r"state\.v has shape \[4, 3, 5\] but current is \[4, 2, 3, 5\].*state=None"
    with pytest.raises(ValueError, match=message):
        module(random_current(batch=2), state)


@every_neuron
def test_recomputation_in_the_backward_pass(neuron: type[nn.Module]) -> None:
    """Checkpointing runs the forward pass twice, which would update a remembered potential twice."""
    module = neuron(CHANNELS)
    results = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        current = random_current().requires_grad_()
        spikes = run(current)
        spikes.sum().backward()
        results.append((spikes, current.grad))
    for direct, recomputed in zip(*results, strict=True):
        assert torch.equal(direct, recomputed)


@every_neuron
def test_autocast(neuron: type[nn.Module]) -> None:
    module = neuron(CHANNELS)
    current = random_current().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        spikes, state = module(current, return_state=True)
    spikes.float().sum().backward()
    assert spikes.dtype == torch.bfloat16
    assert state.v.dtype == torch.float32
    assert current.grad is not None
    assert current.grad.isfinite().all()
    assert torch.equal(spikes, module(current.detach().float()).bfloat16())


def test_modules_run_their_scan_with_their_parameters() -> None:
    current = random_current()
    given: dict[str, Any] = {"v_threshold": 0.7, "reset": "soft", "detach_reset": False, "surrogate": ATan(1.0)}
    cases = [
        (IF(**given), dynamics.if_scan(current, None, IFParams(**given))),
        (LIF(tau=3.0, **given), dynamics.lif_scan(current, None, LIFParams(tau=3.0, **given))),
        (PLIF(tau=2.0, **given), dynamics.plif_scan(current, None, PLIFParams(**given), torch.tensor(0.0))),
        (
            LIFB(CHANNELS, burst_init=1.5, tau=3.0, **given),
            dynamics.lifb_scan(current, None, LIFBParams(tau=3.0, **given), torch.full((CHANNELS,), 1.5)),
        ),
        (LIFPair(tau=3.0, **given), dynamics.lif_pair_scan(current, None, LIFPairParams(tau=3.0, **given))),
        (
            LIFPair(coupled=False, **given),
            dynamics.lif_pair_scan(current, None, LIFPairParams(coupled=False, **given)),
        ),
    ]
    for module, (spikes, state) in cases:
        got, got_state = module(current, return_state=True)
        assert torch.equal(got, spikes)
        assert torch.equal(got_state.v, state.v)
        assert module.params.surrogate == ATan(1.0)
        assert module.params.detach_reset is False


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (IF(v_threshold=1.0), "v_threshold=1.0, reset=hard, detach_reset=True, surrogate=Triangle(width=0.5)"),
        (LIF(tau=3.0), "v_threshold=0.5, reset=hard, detach_reset=True, surrogate=Triangle(width=0.5), tau=3.0"),
        (PLIF(reset="soft"), "tau=2, v_threshold=0.5, reset=soft, detach_reset=True, surrogate=Triangle(width=0.5)"),
        (LIFB(2), "2, v_threshold=0.5, reset=hard, detach_reset=True, surrogate=Triangle(width=0.5), tau=2.0"),
        (
            LIFPair(coupled=False),
            "v_threshold=0.5, reset=hard, detach_reset=True, surrogate=Triangle(width=0.5), tau=2.0, coupled=False",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_printed_form(module: nn.Module, expected: str) -> None:
    assert repr(module) == f"{type(module).__name__}({expected})"


@pytest.mark.parametrize("tau", [1.01, 1.5, 2.0, 20.0])
def test_plif_starts_at_its_tau(tau: float) -> None:
    # decay is stored in float32; at tau near 1 its exponential is tau - 1 with that relative precision.
    assert PLIF(tau=tau).tau == pytest.approx(tau, rel=1e-6)


@pytest.mark.parametrize("decay", [-30.0, -1.0, 0.0, 5.0])
def test_plif_tau_stays_above_one_whatever_is_learned(decay: float) -> None:
    module = PLIF()
    with torch.no_grad():
        module.decay.fill_(decay)
    assert module.tau == 1 + math.exp(-decay)
    assert module.tau > 1


def test_plif_gradient_of_one_step() -> None:
    """One step from rest below threshold: v = x k, k = sigmoid(decay), so dv/ddecay = x k (1 - k)."""
    module = PLIF(tau=4.0)
    _, state = module(torch.full((1, 1, 1), 1.0), return_state=True)
    state.v.sum().backward()
    assert module.decay.grad is not None
    assert module.decay.grad.item() == pytest.approx(0.25 * 0.75, rel=1e-6)  # float32


@pytest.mark.parametrize("tau", [1.0, 0.5, float("nan")])
def test_plif_tau_of_one_raises(tau: float) -> None:
    with pytest.raises(ValueError, match=r"tau is .* must start above 1 step"):
        PLIF(tau=tau)


def test_lifb_burst_init() -> None:
    assert LIFB(4).strength.tolist() == [2.0] * 4
    assert LIFB(4, burst_init=1).strength.tolist() == [1.0] * 4
    assert LIFB(4, burst_init=1).strength.dtype == torch.float32


def test_lifb_with_strength_one_is_lif() -> None:
    current = 2 * random_current()
    assert torch.equal(LIFB(CHANNELS, burst_init=1.0)(current), LIF()(current))
    assert not torch.equal(LIFB(CHANNELS, burst_init=2.0)(current), LIF()(current))


def test_lifb_trains_its_strength() -> None:
    module = LIFB(CHANNELS)
    module(torch.full((2, 1, CHANNELS), 3.0)).sum().backward()
    assert module.strength.grad is not None
    assert module.strength.grad.tolist() == [2.0] * CHANNELS


def test_lifb_with_wrong_channel_count_raises() -> None:
    with pytest.raises(ValueError, match=r"current has shape \[4, 2, 3, 5\], but 8 burst strengths need \[T, B, 8"):
        LIFB(8)(random_current())


@pytest.mark.parametrize("coupled", [True, False])
def test_a_pair_sends_the_spikes_of_both_neurons(coupled: bool) -> None:
    current = 2 * random_current(steps=8)
    fired, burst = LIFPair(coupled=coupled)(current).chunk(2, 2)
    assert torch.equal(fired, LIF()(current))
    assert 0 < burst.mean() < fired.mean()
    if coupled:
        assert torch.equal(fired + 0.5 * burst, LIFB(CHANNELS, burst_init=1.5)(current))
    else:
        assert torch.equal(burst, LIF(v_threshold=1.0)(current))


@pytest.mark.skipif(cpp_compiler() is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_pair_is_the_reference() -> None:
    """Exact in binary, so that fusing moves no spike."""
    current = (64 * random_current(steps=2)).round() / 32
    spikes, state = LIFPair(implementation="compiled")(current, return_state=True)
    expected, end = LIFPair(implementation="reference")(current, return_state=True)
    assert torch.equal(spikes, expected)
    assert torch.equal(state.v, end.v)
    torch.compiler.reset()  # leave no graphs behind for other tests


@pytest.mark.parametrize("neuron", [IF, LIF, PLIF, LIFPair])
def test_other_neurons_take_any_channel_count(neuron: type[nn.Module]) -> None:
    assert torch.equal(neuron(64)(random_current()), neuron()(random_current()))


@every_neuron
def test_unknown_implementation_raises_when_built(neuron: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"implementation is 'fast', but must be one of"):
        neuron(CHANNELS, implementation="fast")


@every_neuron
@pytest.mark.parametrize("given", [{"v_threshold": 0.0}, {"reset": "none"}])
def test_bad_parameters_raise_when_built(neuron: type[nn.Module], given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"v_threshold|reset"):
        neuron(CHANNELS, **given)


@pytest.mark.parametrize("neuron", [LIF, PLIF, LIFB])
@pytest.mark.parametrize("value", ["2", None])
def test_parameters_that_are_no_numbers(neuron: type[nn.Module], value: object) -> None:
    for name in ("tau", "v_threshold"):
        with pytest.raises(TypeError, match=rf"{name} is {value!r}, but must be a number"):
            neuron(CHANNELS, **{name: value})


@every_neuron
def test_copies_and_state_dicts(neuron: type[nn.Module]) -> None:
    module = neuron(CHANNELS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3)
    current = 2 * random_current()
    duplicate = copy.deepcopy(module)
    fresh = neuron(CHANNELS)
    fresh.load_state_dict(module.state_dict())
    for same in (duplicate, fresh):
        assert torch.equal(same(current), module(current))
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    assert torch.equal(fresh(current), module(current))  # parameters are not shared with the copy


def test_default_surrogates_are_equal_values() -> None:
    assert LIF().params == LIF().params
    assert LIF().params.surrogate == Triangle()


def integrator_step(x: Tensor, v: Tensor, params: IFParams) -> tuple[Tensor, Tensor]:
    """A neuron that never resets and passes its potential on."""
    return v + x, v + x


class Integrator(Neuron):
    def __init__(self) -> None:
        super().__init__("auto")
        self.params = IFParams()

    def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
        return kernels.scan(integrator_step, current, state, self.params, implementation=self.implementation)


def test_a_neuron_of_ones_own_streams_like_the_others() -> None:
    neuron = Integrator()
    current = torch.tensor([1.0, 2.0, -4.0]).view(3, 1, 1)
    assert neuron(current).flatten().tolist() == [1, 3, -1]
    _, state = neuron(current[:2], return_state=True)
    assert neuron(current[2:], state).item() == -1


def test_a_neuron_without_scan_says_so() -> None:
    with pytest.raises(NotImplementedError):
        Neuron("auto")(random_current())


@pytest.mark.parametrize("wrong", [3.0, 0, -1, "3"])
@pytest.mark.parametrize("neuron", [IF, LIF, PLIF, LIFB])
def test_first_argument_is_a_channel_count(neuron: type, wrong: object) -> None:
    """Elsewhere the first argument is tau, a leak or a threshold: nobody's number may be dropped in silence."""
    with pytest.raises(TypeError, match=r"LIF\(tau=2.0"):
        neuron(wrong)


def test_state_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="NeuronState"):
        LIF()(torch.zeros(2, 3), torch.zeros(3))  # type: ignore[arg-type]


def test_detached_state_cuts_the_past() -> None:
    """Truncated backpropagation: the second part can be differentiated alone."""
    lif = LIF()
    current = torch.full((4, 1), 0.3, requires_grad=True)
    _, state = lif(current[:2], return_state=True)
    lif(current[2:], state.detach()).sum().backward()
    assert current.grad is not None
    assert (current.grad[:2] == 0).all()
    assert (current.grad[2:] != 0).any()
