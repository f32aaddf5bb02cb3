"""Imported neurons fire the spikes of the neurons that they were made from, run here beside them."""

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranvier.dynamics import ATan, IFParams, LIFParams, Rectangle, Sigmoid, Triangle
from ranvier.nn import IF, LIF, PLIF, Neuron, foreign, from_snntorch, from_spikingjelly

few = settings(max_examples=40, deadline=None)
steps = st.integers(1, 8)
seeds = st.integers(0, 2**31)
thresholds = st.floats(0.1, 3.0)
alphas = st.floats(0.5, 5.0)


@pytest.fixture(scope="module")
def sj() -> ModuleType:
    return pytest.importorskip(
        "spikingjelly.activation_based.neuron", reason="needs spikingjelly: pip install --no-deps -r peers.txt"
    )


@pytest.fixture(scope="module")
def snn() -> ModuleType:
    return pytest.importorskip("snntorch", reason="needs snntorch: pip install snntorch")


def sj_surrogate(name: str, alpha: float) -> nn.Module:
    from spikingjelly.activation_based import surrogate

    return getattr(surrogate, name)(alpha)


def random_current(T: int, seed: int, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Around the threshold, so that some neurons fire and some do not."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * (torch.randn(T, 2, 8, generator=generator, dtype=torch.float64) + 0.5)).to(dtype)


def distances(neuron: Neuron, current: Tensor) -> Tensor:
    """Distance to threshold at every step, over the threshold."""
    params: Any = neuron.params
    leak = 1 / params.tau if isinstance(neuron, LIF) else 1.0
    if isinstance(neuron, PLIF):
        leak = torch.sigmoid(neuron.decay.detach().double()).item()
    v, found = torch.zeros_like(current[0], dtype=torch.float64), []
    for x in current.double():
        h = v + x if isinstance(neuron, IF) else v + (x - v) * leak
        found.append(h - params.v_threshold)
        s = (h >= params.v_threshold).double()
        v = h * (1 - s) if params.reset == "hard" else h - params.v_threshold * s
    return torch.stack(found) / params.v_threshold


def assume_no_ties(neuron: Neuron, current: Tensor) -> None:
    """Nothing within rounding of its threshold, nor of an edge of a surrogate that has edges."""
    u = distances(neuron, current).abs()
    assume(u.min() > 1e-4)
    width = getattr(neuron.params.surrogate, "width", None)
    assume(width is None or (u - width / neuron.params.v_threshold).abs().min() > 1e-4)


def run_spikingjelly(node: Any, current: Tensor) -> Tensor:
    node.reset()
    node.step_mode = "m"
    return node(current)


def run_snntorch(leaky: Any, current: Tensor) -> Tensor:
    spikes, mem = [], leaky.reset_mem()
    for x in current:
        spike, mem = leaky(x, mem)
        spikes.append(spike)
    return torch.stack(spikes)


def same_spikes_and_gradients(theirs: Any, ours: Neuron, run: Any, current: Tensor, learned: Any = ()) -> None:
    """Spikes at both precisions exactly; gradients in double precision, where rounding is far below the tolerance."""
    assume_no_ties(ours, current)
    ours.implementation = "reference"
    assert torch.equal(run(theirs, current.float()), ours(current.float()))
    weights = torch.linspace(-1, 1, current.numel(), dtype=torch.float32).view_as(current)
    gradients = []
    for forward, parameters in (
        (lambda x: run(theirs, x), [getattr(theirs, name) for name, _ in learned]),
        (ours, [getattr(ours, name) for _, name in learned]),
    ):
        x = current.clone().requires_grad_()
        spikes = forward(x)
        gradients.append([spikes.double(), *torch.autograd.grad((spikes * weights).sum(), [x, *parameters])])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other.to(one), rtol=1e-5, atol=1e-5)


resets = st.sampled_from([None, 0.0, -0.5, 0.05])
sj_surrogates = st.tuples(st.sampled_from(["ATan", "Sigmoid", "PiecewiseQuadratic", "Rect"]), alphas)


@few
@given(
    T=steps, seed=seeds, v_threshold=thresholds, v_reset=resets, detach=st.booleans(), surrogate=sj_surrogates,
)  # fmt: skip
def test_if_node(
    sj: ModuleType, T: int, seed: int, v_threshold: float, v_reset: float | None, detach: bool, surrogate: Any
) -> None:
    node = sj.IFNode(v_threshold, v_reset, sj_surrogate(*surrogate), detach)
    ours = from_spikingjelly(node)
    assert isinstance(ours, IF)
    same_spikes_and_gradients(node, ours, run_spikingjelly, random_current(T, seed, v_threshold / 2))


@few
@given(
    T=steps, seed=seeds, tau=st.floats(1.01, 30), decay_input=st.booleans(), v_threshold=thresholds, v_reset=resets,
    detach=st.booleans(), surrogate=sj_surrogates,
)  # fmt: skip
def test_lif_node(
    sj: ModuleType,
    T: int,
    seed: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach: bool,
    surrogate: Any,
) -> None:
    """Also with an undecayed input and another reset potential, which ours says with another threshold."""
    node = sj.LIFNode(tau, decay_input, v_threshold, v_reset, sj_surrogate(*surrogate), detach)
    ours = from_spikingjelly(node)
    assert isinstance(ours, LIF)
    current = random_current(T, seed, v_threshold * (tau if decay_input else 1))
    same_spikes_and_gradients(node, ours, run_spikingjelly, current)


@few
@given(
    T=steps, seed=seeds, tau=st.floats(1.05, 20), v_threshold=thresholds, v_reset=resets, detach=st.booleans(),
    surrogate=sj_surrogates,
)  # fmt: skip
def test_parametric_lif_node(
    sj: ModuleType,
    T: int,
    seed: int,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    detach: bool,
    surrogate: Any,
) -> None:
    """With the gradient of the learned leak."""
    node = sj.ParametricLIFNode(tau, True, v_threshold, v_reset, sj_surrogate(*surrogate), detach)
    ours = from_spikingjelly(node)
    assert isinstance(ours, PLIF)
    assert ours.tau == pytest.approx(tau, rel=1e-5)
    current = random_current(T, seed, v_threshold * tau)
    same_spikes_and_gradients(node, ours, run_spikingjelly, current, learned=[("w", "decay")])


@pytest.mark.parametrize("v_reset", [None, 0.0])
@pytest.mark.parametrize("kind", ["IFNode", "LIFNode", "ParametricLIFNode"])
def test_ties_agree_with_spikingjelly(sj: ModuleType, kind: str, v_reset: float | None) -> None:
    """Multiples of 1/2 meet a threshold of 1 all the time; both fire then."""
    node = getattr(sj, kind)(v_threshold=1.0, v_reset=v_reset)
    ours = from_spikingjelly(node)
    current = torch.randint(-2, 6, (8, 4, 64), generator=torch.Generator().manual_seed(0)) / 2
    assert (distances(ours, current) == 0).sum() > 20
    assert torch.equal(run_spikingjelly(node, current), ours(current))


def test_learned_leak_is_a_copy(sj: ModuleType) -> None:
    node = sj.ParametricLIFNode(init_tau=3.0)
    node.w.requires_grad_(False)
    ours = from_spikingjelly(node)
    assert isinstance(ours, PLIF)
    assert not ours.decay.requires_grad
    node.w += 1
    assert ours.tau == pytest.approx(3.0)


@few
@given(
    T=steps, seed=seeds, beta=st.one_of(st.floats(0, 0.99), st.sampled_from([0.0, 1.0, 1.5, -0.5])),
    threshold=thresholds, delay=st.booleans(), surrogate=st.tuples(st.sampled_from(["atan", "sigmoid"]), alphas),
)  # fmt: skip
def test_leaky_with_reset_to_zero(
    snn: ModuleType, T: int, seed: int, beta: float, threshold: float, delay: bool, surrogate: tuple[str, float]
) -> None:
    """The delay moves the reset to the next call, before the leak: the same spikes; it decides about the gradient."""
    import snntorch.surrogate

    grad = getattr(snntorch.surrogate, surrogate[0])(surrogate[1])
    leaky = snn.Leaky(beta, threshold=threshold, spike_grad=grad, reset_mechanism="zero", reset_delay=delay)
    ours = from_snntorch(leaky)
    assert isinstance(ours, IF if beta >= 1 else LIF)
    assert ours.params.detach_reset is delay
    same_spikes_and_gradients(leaky, ours, run_snntorch, random_current(T, seed, threshold))


@few
@given(T=steps, seed=seeds, threshold=thresholds)
def test_leaky_without_leak_by_subtraction(snn: ModuleType, T: int, seed: int, threshold: float) -> None:
    leaky = snn.Leaky(1.0, threshold=threshold)
    ours = from_snntorch(leaky)
    assert isinstance(ours, IF)
    assert ours.params.reset == "soft"
    same_spikes_and_gradients(leaky, ours, run_snntorch, random_current(T, seed, threshold))


def test_ties_fire_here_and_not_in_snntorch(snn: ModuleType) -> None:
    leaky = snn.Leaky(0.5, reset_mechanism="zero")
    one = torch.ones(1, 1, 1)
    assert run_snntorch(leaky, one).item() == 0
    assert from_snntorch(leaky)(one).item() == 1


def test_parameters_by_hand(sj: ModuleType, snn: ModuleType) -> None:
    """h = 3/4 v + x against 2 is 1/4 of it against 1/2, whose slope is four times as steep."""
    zero = {"reset_mechanism": "zero", "threshold": 2.0}
    assert from_snntorch(snn.Leaky(0.75, **zero)).params == LIFParams(0.5, "hard", True, ATan(8.0), 4.0)
    assert from_snntorch(snn.Leaky(torch.full((5,), 0.75), **zero)).params.tau == 4.0
    node = sj.LIFNode(4.0, False, 1.0, -1.0, sj_surrogate("PiecewiseQuadratic", 0.5))
    assert from_spikingjelly(node).params == LIFParams(0.5, "hard", False, Triangle(0.5), 4.0)
    node = sj.IFNode(1.0, None, sj_surrogate("Rect", 0.5), True)
    assert from_spikingjelly(node).params == IFParams(1.0, "soft", True, Rectangle(1.0))


def test_random_currents_make_some_neurons_fire(sj: ModuleType, snn: ModuleType) -> None:
    """Else the comparisons above would compare silence."""
    for neuron, scale in (
        (from_spikingjelly(sj.LIFNode(4.0)), 4.0),
        (from_spikingjelly(sj.LIFNode(4.0, decay_input=False)), 1.0),
        (from_snntorch(snn.Leaky(0.9, reset_mechanism="zero")), 1.0),
    ):
        assert 0.2 < neuron(random_current(8, 0, scale)).mean() < 0.8


# What cannot be imported: each refusal stands beside a trace, computed by hand, on which the nearest neuron differs.

SUBTRACT = {"reset_mechanism": "subtract"}


@pytest.mark.parametrize(
    ("options", "current", "theirs", "message"),
    [
        # v = 2 fires; 1 + 3/4 - 1 = 3/4 is silent. Ours: (2 - 1) / 2 + 3/4 = 5/4 fires.
        ({"beta": 0.5, **SUBTRACT}, (2.0, 0.75), (1, 0), "subtracted after the leak.*beta = 0.5 of it.*'zero'"),
        # v = 4 fires and leaves 3; 3/2 + 1/4 - 1 = 3/4 is silent. Ours: 3/2 + 1/4 = 7/4 fires.
        ({"beta": 0.5, "reset_delay": False, **SUBTRACT}, (4.0, 0.25), (1, 0), "above twice the threshold"),
        # v = 4 fires and leaves 3; 3 + 1/4 - 1 = 9/4 fires, and is not reset; 9/4 - 1 - 1 = 1/4 is silent.
        ({"beta": 1.0, "reset_delay": False, **SUBTRACT}, (4.0, 0.25, -1.0), (1, 1, 0), r"nn\.IF\(v_threshold=1, "),
        # 2, 1 + 3/4, 7/8 + 1/4 = 9/8: all fire. Ours: 2, 1/2 + 3/4 = 5/4, and 1/8 + 1/4 = 3/8 is silent.
        ({"beta": 0.5, "reset_mechanism": "none"}, (2.0, 0.75, 0.25), (1, 1, 1), "never reset"),
    ],
)
def test_resets_that_have_no_equivalent(
    snn: ModuleType, options: dict[str, Any], current: tuple[float, ...], theirs: tuple[int, ...], message: str
) -> None:
    leaky = snn.Leaky(**options)
    with pytest.raises(ValueError, match=message) as refusal:
        from_snntorch(leaky)
    x = torch.tensor(current).view(-1, 1, 1)
    assert run_snntorch(leaky, x).flatten().tolist() == list(theirs)
    nearest = re.search(r"take the nearest, ranvier\.(nn\..*), and train on", str(refusal.value))
    assert nearest is not None
    assert eval(nearest[1], {"nn": sys.modules["ranvier.nn"]})(x).flatten().tolist() != list(theirs)


@pytest.mark.parametrize(
    ("mechanism", "current", "theirs"),
    [
        ("zero", (4.0, 4.0), (1, 0)),  # 2 fires, and 0 instead of 2 follows
        ("subtract", (4.0, 1.5), (1, 0)),  # 2 fires, 1 + 3/4 - 1 = 3/4 follows instead of (2 - 1) / 2 + 3/4
    ],
)
def test_lapicque_never_matches(snn: ModuleType, mechanism: str, current: Any, theirs: Any) -> None:
    lapicque = snn.Lapicque(R=1, C=2, reset_mechanism=mechanism)
    with pytest.raises(ValueError, match=r"Lapicque neuron has no equivalent.*ranvier\.nn\.LIF"):
        from_snntorch(lapicque)
    x = torch.tensor(current).view(-1, 1, 1)
    assert run_snntorch(lapicque, x).flatten().tolist() == list(theirs)
    nearest = LIF(tau=2.0, v_threshold=1.0, reset="hard" if mechanism == "zero" else "soft")
    assert nearest(x).flatten().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": torch.tensor([0.5, 0.6])}, r"beta differs between neurons \(2 values\)"),
        ({"beta": 0.5, "threshold": torch.tensor([0.5, 0.6])}, "threshold differs"),
        ({"beta": 0.5, "threshold": 0.0}, "fires without input"),
        ({"beta": 0.5, "learn_beta": True}, r"learns its beta.*leaky\.beta\.requires_grad_\(False\)"),
        ({"beta": 0.5, "learn_threshold": True}, "learns its threshold"),
        ({"beta": 0.5, "learn_graded_spikes_factor": True}, "learns its graded_spikes_factor"),
        ({"beta": 0.5, "graded_spikes_factor": 2.0}, "height 2 .*weights of the next layer"),
        ({"beta": 0.5, "state_quant": torch.round}, "state_quant"),
        ({"beta": 0.5, "surrogate_disable": True}, "surrogate_disable=True.*Pass surrogate="),
        ({"beta": 0.5, "spike_grad": "fast_sigmoid"}, "surrogate fast_sigmoid of snnTorch .*known are atan, sigmoid"),
        ({"beta": 0.5, "spike_grad": "triangular"}, "surrogate triangular"),
        ({"beta": 0.5, "spike_grad": "straight_through_estimator"}, "surrogate straight_through_estimator"),
    ],
)
def test_options_of_leaky_that_ours_do_not_have(snn: ModuleType, options: dict[str, Any], message: str) -> None:
    import snntorch.surrogate

    if isinstance(options.get("spike_grad"), str):
        options = options | {"spike_grad": getattr(snntorch.surrogate, options["spike_grad"])()}
    with pytest.raises(ValueError, match=message):
        from_snntorch(snn.Leaky(reset_mechanism="zero", **options))


def test_inhibition(snn: ModuleType) -> None:
    with pytest.warns(UserWarning, match="Inhibition is an unstable feature"):
        leaky = snn.Leaky(0.5, reset_mechanism="zero", inhibition=True)
    with pytest.raises(ValueError, match="inhibition=True"):
        from_snntorch(leaky)


def test_reset_mechanism_that_was_set_later(snn: ModuleType) -> None:
    """The setter changes what the neuron says, and not the function that it computes."""
    leaky = snn.Leaky(0.5)
    leaky.reset_mechanism = "zero"
    with pytest.raises(ValueError, match="built with reset_mechanism='subtract' and says 'zero'"):
        from_snntorch(leaky)


def test_frozen_parameters_are_taken_as_they_are(snn: ModuleType) -> None:
    leaky = snn.Leaky(0.5, reset_mechanism="zero", learn_beta=True)
    leaky.beta.requires_grad_(False)
    assert from_snntorch(leaky).params.tau == 2.0


def test_older_snntorch(snn: ModuleType) -> None:
    leaky = snn.Leaky(0.5, reset_mechanism="zero")
    del leaky.reset_delay
    with pytest.raises(ValueError, match=r"older snnTorch.*snnTorch 1\.0"):
        from_snntorch(leaky)


def test_another_surrogate(sj: ModuleType, snn: ModuleType) -> None:
    import snntorch.surrogate

    leaky = snn.Leaky(0.5, reset_mechanism="zero", spike_grad=snntorch.surrogate.fast_sigmoid())
    assert from_snntorch(leaky, surrogate=Sigmoid(2.0)).params.surrogate == Sigmoid(2.0)
    assert from_spikingjelly(sj.IFNode(), surrogate=ATan()).params.surrogate == ATan()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ParametricLIFNode", {"decay_input": False, "init_tau": 4.0}, r"LIFNode\(tau=4, decay_input=False"),
        ("IFNode", {"v_threshold": 1.0, "v_reset": 1.0}, "fires again without input"),
        ("LIFNode", {"v_threshold": 0.0, "v_reset": None}, "fires again without input"),
        ("IFNode", {"surrogate_function": "SoftSign"}, "surrogate SoftSign of SpikingJelly .*PiecewiseQuadratic, Rect"),
        ("IFNode", {"surrogate_function": "Erf"}, "surrogate Erf"),
    ],
)
def test_nodes_that_have_no_equivalent(sj: ModuleType, kind: str, options: dict[str, Any], message: str) -> None:
    from spikingjelly.activation_based import surrogate

    if "surrogate_function" in options:
        options = {"surrogate_function": getattr(surrogate, options["surrogate_function"])()}
    with pytest.raises(ValueError, match=message):
        from_spikingjelly(getattr(sj, kind)(**options))


def test_surrogate_that_does_not_spike(sj: ModuleType) -> None:
    node = sj.IFNode()
    node.surrogate_function.set_spiking_mode(False)
    try:
        for surrogate in (None, ATan()):
            with pytest.raises(ValueError, match="spiking=False"):
                from_spikingjelly(node, surrogate=surrogate)
    finally:
        node.surrogate_function.set_spiking_mode(True)  # theirs is one instance, the default of all nodes


def test_potential_at_another_precision(sj: ModuleType) -> None:
    node = sj.IFNode()
    node._neuron_precision = ("bfloat16", "fp32", "fp32")
    with pytest.raises(ValueError, match="another precision"):
        from_spikingjelly(node)


def test_other_modules(sj: ModuleType, snn: ModuleType) -> None:
    class Mine(sj.LIFNode):
        """May compute anything."""

    for importer, module in (
        (from_spikingjelly, nn.ReLU()),
        (from_spikingjelly, Mine()),
        (from_spikingjelly, sj.QIFNode()),
        (from_spikingjelly, snn.Leaky(0.5)),
        (from_snntorch, snn.Synaptic(0.5, 0.5)),
        (from_snntorch, sj.IFNode()),
    ):
        with pytest.raises(TypeError, match=f"but a .*{type(module).__name__} came"):
            importer(module)


def test_recognised_by_name_alone() -> None:
    """Of a module that is no folder yet, as in releases before 2.0, and without either library."""
    names = {"v_threshold": 2.0, "v_reset": None, "detach_reset": True}
    surrogate = type("ATan", (), {"__module__": "spikingjelly.activation_based.surrogate", "alpha": 3.0})()
    surrogate.spiking = True
    kind = type("IFNode", (nn.Module,), {"__module__": "spikingjelly.activation_based.neuron", **names})
    node = kind()
    node.surrogate_function = surrogate
    assert from_spikingjelly(node).params == IFParams(2.0, "soft", True, ATan(3.0))
    impostor = type("IFNode", (nn.Module,), {"__module__": "spikingjelly.activation_based.neurons", **names})
    with pytest.raises(TypeError, match="expected IFNode"):
        from_spikingjelly(impostor())


def test_neither_library_is_imported() -> None:
    code = "import json, sys, ranvier.nn.foreign; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"snntorch", "spikingjelly"} & set(json.loads(done.stdout))


@pytest.mark.parametrize("importer", [from_spikingjelly, from_snntorch])
def test_examples_of_the_docstrings(importer: Any, request: pytest.FixtureRequest) -> None:
    """They stand there as skipped, because `pytest src` has to pass without the other libraries."""
    request.getfixturevalue("sj" if importer is from_spikingjelly else "snn")
    text = importer.__doc__.replace("# doctest: +SKIP", "")
    example = doctest.DocTestParser().get_doctest(text, dict(vars(foreign)), importer.__name__, None, None)
    assert len(example.examples) == 2
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0
    assert result.attempted == 2


PAGE = Path(__file__).parents[2] / "docs" / "importing.md"


def test_examples_of_the_page(sj: ModuleType, snn: ModuleType) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert blocks
    place: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), place)
