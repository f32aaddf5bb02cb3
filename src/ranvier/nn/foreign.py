"""Neurons of SpikingJelly and snnTorch as neurons of this library that fire the same spikes.

The other library is never imported: an object is recognised by the name and the module of its class. Two identities
turn most of their conventions into ours.

    another unit    h = (1 - 1/tau) v + x, fires at v_threshold, slope g(u)      (the input is not divided by tau)
                    = tau times  h = v + (x - v) / tau, fires at v_threshold / tau, slope tau g(tau u)
    another origin  hard reset to v_reset, start at v_reset, leak towards v_reset
                    = v_reset plus  hard reset to 0, fires at v_threshold - v_reset

What no choice of parameters can express is refused, with what differs and what to do. Spikes agree up to rounding: only
a potential that meets its threshold within the last bits of a float may fire in one library and not in the other.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ranvier.dynamics import ATan, Rectangle, Sigmoid, Surrogate, Triangle
from ranvier.nn.neurons import IF, LIF, PLIF, Neuron

SPIKINGJELLY = "spikingjelly.activation_based"
SNNTORCH = "snntorch"

SPIKINGJELLY_SURROGATES: dict[str, Callable[[float], Surrogate]] = {
    "ATan": ATan,
    "Sigmoid": Sigmoid,
    "PiecewiseQuadratic": lambda alpha: Triangle(1 / alpha),
    "Rect": lambda alpha: Rectangle(0.5 / alpha),
}
"""Surrogates with the same slope as ours, from their `alpha`."""

SNNTORCH_SURROGATES: dict[str, Callable[[float], Surrogate]] = {"atan": ATan, "sigmoid": Sigmoid}
"""Likewise, from their `alpha` or `slope`."""


def from_spikingjelly(node: nn.Module, *, surrogate: Surrogate | None = None) -> Neuron:
    """The neuron that fires as an `IFNode`, `LIFNode` or `ParametricLIFNode` of SpikingJelly does.

        IFNode               IF    v_threshold = theirs - v_reset
        LIFNode              LIF   v_threshold = theirs - v_reset, same tau
          decay_input=False  LIF   v_threshold = (theirs - v_reset) / tau, surrogate steeper by tau
        ParametricLIFNode    PLIF  v_threshold = theirs - v_reset, decay = w

    `v_reset=None` is a soft reset, with nothing to subtract. With `v_reset` 0 or None and `decay_input` the two compute
    the same operations and agree bit for bit; a tie fires in both.

    Args:
        node: The neuron, in either step mode. Ours takes `[T, B, ...]` at once, as theirs in mode `m`.
        surrogate: Gradient to use instead of the node's, in the unit of our potential. Spikes do not depend on it.

    Returns:
        A neuron from rest: what the node remembers of earlier calls is not carried over. Learned parameters are copies.

    Raises:
        TypeError: The node is something else.
        ValueError: No choice of parameters fires the same, or the surrogate is none of ours. The message says what to
            do.

    Source: SpikingJelly 2.0.0, `activation_based/neuron` and its reference kernels.

    >>> from spikingjelly.activation_based import neuron  # doctest: +SKIP
    >>> from_spikingjelly(neuron.LIFNode(tau=2.0, v_reset=None, detach_reset=True))  # doctest: +SKIP
    LIF(v_threshold=1.0, reset=soft, detach_reset=True, surrogate=Sigmoid(alpha=4.0), tau=2.0)
    """
    name = _name_of(node, f"{SPIKINGJELLY}.neuron", ("IFNode", "LIFNode", "ParametricLIFNode"), "from_snntorch")
    theirs: Any = node
    learned_tau = name == "ParametricLIFNode"
    unscaled = name != "IFNode" and not theirs.decay_input
    if getattr(theirs, "_neuron_precision", None) is not None:
        raise ValueError(
            f"the {name} keeps its potential at another precision ({theirs._neuron_precision}), but ours is float32 "
            "or better, so spikes would differ. Import the node as it was before its precision was set."
        )
    if not getattr(theirs.surrogate_function, "spiking", True):
        raise ValueError(
            f"the surrogate of the {name} has spiking=False, so that the node sends a smooth value instead of spikes. "
            "Call set_spiking_mode(True) on it first."
        )
    if learned_tau and unscaled:
        raise ValueError(
            "the ParametricLIFNode has decay_input=False. Ours divides its input by tau, which is the same only if the "
            f"threshold is divided too, and here tau is learned. Train with decay_input=True, or import the fixed "
            f"LIFNode(tau={1 / _number('w', theirs.w.sigmoid()):.6g}, decay_input=False, ...)."
        )
    v_reset = None if theirs.v_reset is None else _number("v_reset", theirs.v_reset)
    distance = _number("v_threshold", theirs.v_threshold) - (v_reset or 0.0)
    if not distance > 0:
        raise ValueError(
            f"the {name} has v_threshold={theirs.v_threshold} and v_reset={theirs.v_reset}: it resets to where it "
            "fires again without input. Ours needs a threshold above the reset."
        )
    scale = float(theirs.tau) if unscaled else 1.0
    firing: dict[str, Any] = {
        "v_threshold": distance / scale,
        "reset": "soft" if v_reset is None else "hard",
        "detach_reset": bool(theirs.detach_reset),
        "surrogate": surrogate or _surrogate_of_spikingjelly(theirs.surrogate_function, scale),
    }
    if name == "IFNode":
        return IF(**firing)
    if name == "LIFNode":
        return LIF(tau=float(theirs.tau), **firing)
    plif = PLIF(**firing)
    plif.decay = nn.Parameter(theirs.w.detach().clone().reshape(()), requires_grad=theirs.w.requires_grad)
    return plif


def from_snntorch(neuron: nn.Module, *, surrogate: Surrogate | None = None) -> Neuron:
    """The neuron that fires as a `Leaky` of snnTorch does.

        theirs  h = beta v + x,  s = (h > threshold)
        ours    tau = 1 / (1 - beta),  v_threshold = threshold / tau,  surrogate steeper by tau;  IF where beta = 1

    What is reset when decides whether there is such a neuron.

        reset_mechanism  reset_delay  beta
        zero             either       any    hard reset; the gradient ignores it with the delay, and not without
        subtract         True         1      soft reset
        subtract         True         < 1    none: theirs subtracts the threshold after the leak, ours before it
        subtract         False        any    none: a potential still above threshold is charged with a second reset
                                             before the comparison
        none             either       any    none: ours always resets

    `Lapicque` never matches: its reset to zero discards the input of the next step too, and its subtraction comes after
    the leak. At a tie (`h = threshold`) ours fires and theirs does not.

    Args:
        neuron: The neuron. `init_hidden` and `output` only change how theirs is called.
        surrogate: Gradient to use instead of the neuron's, in the unit of our potential (theirs / tau). Spikes do not
            depend on it.

    Returns:
        A neuron from rest: `mem` is not carried over.

    Raises:
        TypeError: The neuron is something else.
        ValueError: No choice of parameters fires the same, or the surrogate is none of ours. The message says what to
            do.

    Source: snnTorch 1.0.0, `_neurons/leaky.py`. Differs from it in: a tie fires.

    >>> import snntorch  # doctest: +SKIP
    >>> from_snntorch(snntorch.Leaky(beta=0.75, reset_mechanism="zero"))  # doctest: +SKIP
    LIF(v_threshold=0.25, reset=hard, detach_reset=True, surrogate=ATan(alpha=8.0), tau=4.0)
    """
    name = _name_of(neuron, SNNTORCH, ("Leaky", "Lapicque"), "from_spikingjelly")
    theirs: Any = neuron
    if name == "Lapicque":
        raise ValueError(
            "a Lapicque neuron has no equivalent: its reset to zero also discards the input of the step after a spike, "
            "and its reset by subtraction comes after the leak, where ours comes before it. Train with "
            'snntorch.Leaky(beta=1 - time_step / (R * C), reset_mechanism="zero"), or with ranvier.nn.LIF.'
        )
    _check_plain_leaky(theirs, surrogate)
    beta = min(max(_number("beta", theirs.beta), 0.0), 1.0)  # theirs is clamped at every call
    threshold = _number("threshold", theirs.threshold)
    if not threshold > 0:
        raise ValueError(f"the Leaky has threshold {threshold}: it fires without input. Ours needs one above 0.")
    scale = 1.0 if beta == 1 else 1 / (1 - beta)
    reset = _reset_of_leaky(theirs, beta, threshold)
    firing: dict[str, Any] = {
        "v_threshold": threshold / scale,
        "reset": reset,
        "detach_reset": bool(theirs.reset_delay),
        "surrogate": surrogate or _surrogate_of_snntorch(theirs.spike_grad, scale),
    }
    return IF(**firing) if beta == 1 else LIF(tau=scale, **firing)


def _check_plain_leaky(leaky: Any, surrogate: Surrogate | None) -> None:
    """Raise for options of Leaky that change its spikes and that ours do not have."""
    if not hasattr(leaky, "reset_delay"):
        raise ValueError(
            "the Leaky has no reset_delay, so it is of an older snnTorch, whose reset differs. "
            "Build it with snnTorch 1.0 and load its state dict."
        )
    if leaky.inhibition:
        raise ValueError(
            "the Leaky has inhibition=True: only the neuron with the highest potential fires, while ours do not know "
            "of each other. Train with inhibition=False."
        )
    if leaky.state_quant:
        raise ValueError(
            "the Leaky has state_quant: its potential is rounded at every step, ours is not. "
            "Train with state_quant=False."
        )
    if leaky.surrogate_disable and surrogate is None:
        raise ValueError(
            "the Leaky has surrogate_disable=True, and ours always have a gradient. "
            "Pass surrogate=, for example ranvier.dynamics.ATan(); spikes do not depend on it."
        )
    for name in ("beta", "threshold", "graded_spikes_factor"):
        value = getattr(leaky, name)
        if isinstance(value, nn.Parameter) and value.requires_grad:
            raise ValueError(
                f"the Leaky learns its {name}, and ours would keep the present value. If that is meant, freeze it "
                f"first: leaky.{name}.requires_grad_(False). A learned leak is ranvier.nn.PLIF."
            )
    factor = _number("graded_spikes_factor", leaky.graded_spikes_factor)
    if factor != 1:
        raise ValueError(
            f"the Leaky sends spikes of height {factor:g} (graded_spikes_factor), ours have height 1. "
            "Multiply the weights of the next layer by it and set it to 1."
        )


def _reset_of_leaky(leaky: Any, beta: float, threshold: float) -> str:
    """`hard` or `soft`; raises where ours resets otherwise."""
    mechanisms = ("subtract", "zero", "none")
    # The function that computes is chosen when the neuron is built; the property may have been set since.
    computed = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}[leaky.state_function.__name__]
    stated = mechanisms[int(leaky.reset_mechanism_val)]
    if computed != stated:
        raise ValueError(
            f"the Leaky was built with reset_mechanism={computed!r} and says {stated!r} now, so that parts of it "
            "compute the one and parts the other. Build it with the mechanism that is meant."
        )
    if computed == "zero":
        return "hard"
    if computed == "subtract" and leaky.reset_delay and beta == 1:
        return "soft"
    tau = f"tau={1 / (1 - beta):.6g}, " if beta < 1 else ""
    nearest = (
        f'ranvier.nn.{"LIF" if beta < 1 else "IF"}({tau}v_threshold={threshold * (1 - beta or 1):.6g}, reset="soft")'
    )
    if computed == "none":
        what = "reset_mechanism='none': it is never reset, and ours always is"
    elif leaky.reset_delay:
        what = (
            f"reset_mechanism='subtract' with reset_delay=True: the threshold is subtracted after the leak, where ours "
            f"subtracts it before, which leaves beta = {beta:g} of it. The two agree for beta = 1 only"
        )
    else:
        what = (
            "reset_mechanism='subtract' with reset_delay=False: after a potential above twice the threshold, it "
            "compares the next one less a second threshold, which ours does not"
        )
    raise ValueError(
        f"the Leaky has {what}. Train with reset_mechanism='zero', which is the same in both, or take the nearest, "
        f"{nearest}, and train on."
    )


def _surrogate_of_spikingjelly(function: Any, scale: float) -> Surrogate:
    name = type(function).__name__
    known = type(function).__module__ == f"{SPIKINGJELLY}.surrogate"
    build = SPIKINGJELLY_SURROGATES.get(name) if known else None
    if build is None:
        raise _no_such_surrogate(name, "SpikingJelly", SPIKINGJELLY_SURROGATES)
    return build(_number("alpha", function.alpha) * scale)


def _surrogate_of_snntorch(function: Any, scale: float) -> Surrogate:
    # `snntorch.surrogate.atan(alpha)` returns a closure over alpha, which is the only place where alpha is kept.
    name = getattr(function, "__qualname__", type(function).__name__).split(".")[0]
    known = inspect.isfunction(function) and function.__module__ == f"{SNNTORCH}.surrogate"
    build = SNNTORCH_SURROGATES.get(name) if known else None
    if build is None:
        raise _no_such_surrogate(name, "snnTorch", SNNTORCH_SURROGATES)
    ((parameter, value),) = inspect.getclosurevars(function).nonlocals.items()
    return build(_number(parameter, value) * scale)


def _no_such_surrogate(name: str, library: str, known: Mapping[str, Any]) -> ValueError:
    return ValueError(
        f"the surrogate {name} of {library} has no counterpart here; known are {', '.join(known)}. "
        "Pass surrogate=, for example ranvier.dynamics.ATan(); spikes do not depend on it."
    )


def _name_of(module: object, package: str, names: tuple[str, ...], other: str) -> str:
    """Class name of a neuron of `package`; the exact class, because a subclass may compute something else."""
    kind = type(module)
    if kind.__name__ in names and f"{kind.__module__}.".startswith(f"{package}."):
        return kind.__name__
    raise TypeError(
        f"expected {', '.join(names)} of {package.split('.')[0]}, but a {kind.__module__}.{kind.__qualname__} came. "
        f"For the other library there is {other}; a subclass or another neuron has to be written as a step function "
        "for ranvier.kernels.scan."
    )


def _number(name: str, value: float | torch.Tensor) -> float:
    """`value` as one float, if it is one for all neurons."""
    values = torch.as_tensor(value).detach().double().flatten()
    if len(values) == 0 or (values != values[0]).any():
        raise ValueError(
            f"{name} differs between neurons ({len(values)} values), but ours has one for the layer. "
            "Train with a single one."
        )
    return values[0].item()
