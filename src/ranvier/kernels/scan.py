"""The scans of `ranvier.dynamics`, made fast: same names, same signatures, plus `implementation=`.

`compiled` is the reference itself, put through torch.compile: the loop over T unrolls and fuses to one pass over
memory, and the backward pass keeps one tensor of the size of the input and recomputes the rest. T is static; batch and
feature sizes are dynamic, so a smaller last batch does not compile again.

`native` and `triton` are `ranvier.kernels.fused_scan`, for IF, LIF, PLIF and LIFB on a CPU and on a GPU. Other steps
are compiled, which writes a kernel for them as well.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ranvier import dynamics
from ranvier.dynamics import NeuronState
from ranvier.dynamics.scan import Step, check_scan
from ranvier.kernels.dispatch import Choice, Implementation, choose_scan, compile_whole, run_size
from ranvier.kernels.fused_scan import Backend, fused_scan, unfit

Scan = Callable[..., tuple[Tensor, NeuronState]]


def scan(
    step: Step,
    current: Tensor,
    state: NeuronState | None,
    params: Any,
    *learned: Tensor,
    implementation: Implementation = "auto",
) -> tuple[Tensor, NeuronState]:
    """Run any step function over time: `ranvier.dynamics.scan`, for neurons of your own.

    Args:
        step: Pure function `step(current, v, params, *learned) -> (spikes, v)` of one step, a module-level function.
        current: Input, `[T, B, ...]`.
        state: Carried from an earlier call, or None for rest.
        params: Frozen dataclass of plain numbers (hashable).
        learned: Tensors that train.
        implementation: `auto`, `reference`, `compiled`, or, for the steps of IF, LIF, PLIF and LIFB, `native` or
            `triton`; see `explain`.

    Raises:
        RuntimeError: The one that was asked for cannot run here.
    """
    check_scan(current, state)
    choice = _choose(implementation, step, current, state, params, learned)
    if choice.implementation == "reference":
        return dynamics.scan(step, current, state, params, *learned)
    if choice.implementation in ("native", "triton"):
        return fused_scan(choice.implementation, step, current, state, params, *learned)
    compiled = _compiled(dynamics.scan, step, params, current.shape[0])
    return compiled(step, sizes_open(current, 1), _state_open(state), params, *map(sizes_open, learned))


def _with_implementation(reference: Scan, step: Step) -> Scan:
    """`reference`, which scans `step`, with the extra argument `implementation=`."""

    @functools.wraps(reference)
    def run(
        current: Tensor,
        state: NeuronState | None,
        params: Any,
        *learned: Tensor,
        implementation: Implementation = "auto",
    ) -> tuple[Tensor, NeuronState]:
        check_scan(current, state)
        choice = _choose(implementation, step, current, state, params, learned)
        if choice.implementation == "reference":
            return reference(current, state, params, *learned)
        if choice.implementation in ("native", "triton"):
            return fused_scan(choice.implementation, step, current, state, params, *learned)
        compiled = _compiled(reference, None, params, current.shape[0])
        return compiled(sizes_open(current, 1), _state_open(state), params, *map(sizes_open, learned))

    return run


def _choose(
    implementation: Implementation,
    step: Step,
    current: Tensor,
    state: NeuronState | None,
    params: Any,
    learned: tuple[Tensor, ...],
) -> Choice:
    def why_not(backend: Backend) -> str | None:
        return unfit(backend, step, current, state, params, learned)

    return choose_scan(implementation, current.device, run_size(current), why_not)


@functools.cache
def _compiled(reference: Scan, step: Step | None, params: Any, steps: int) -> Scan:
    """The compiled reference for one set of constants; each has its own count of recompilations."""
    return compile_whole(reference)


def sizes_open(tensor: Tensor, first: int = 0) -> Tensor:
    """The same memory as another tensor, whose sizes from axis `first` the compiler treats as variable.

    `dynamic=True` would open the neuron's numbers too. The mark stays off the caller's tensor. An ordinary view would
    remember it as its base, and the compiler would then guard on the base's sizes.
    """
    alias = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    for axis in range(first, alias.ndim):
        torch._dynamo.maybe_mark_dynamic(alias, axis)
    return alias


def _state_open(state: NeuronState | None) -> NeuronState | None:
    return None if state is None else NeuronState(sizes_open(state.v))


if_scan = _with_implementation(dynamics.if_scan, dynamics.if_step)
lif_scan = _with_implementation(dynamics.lif_scan, dynamics.lif_step)
plif_scan = _with_implementation(dynamics.plif_scan, dynamics.plif_step)
lifb_scan = _with_implementation(dynamics.lifb_scan, dynamics.lifb_step)
