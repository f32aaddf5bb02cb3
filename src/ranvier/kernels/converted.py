"""The scan of converted neurons, made fast: `ranvier.dynamics.converted_scan` plus `implementation=`.

One kernel, of `ranvier.kernels.native_converted` on a CPU and of `ranvier.kernels.triton_converted` on a GPU, runs all
steps where neither gradients nor a compiler watch. Where it cannot, one step is compiled and not the loop, unlike with
the other neurons: calibration runs the same layer at many T, and each T would compile again. With a surrogate, to
fine-tune a network, the reference runs: such a network is compiled whole.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ranvier import dynamics
from ranvier.dynamics import Surrogate
from ranvier.dynamics.converted import ConvertedState, begin, check_converted, check_num_channels, converted_step
from ranvier.dynamics.scan import check_scan, per_channel
from ranvier.kernels.dispatch import Implementation, choose_scan, compile_whole, run_size
from ranvier.kernels.fused_scan import DTYPES, NAMES, Backend, nobody_watches
from ranvier.kernels.scan import sizes_open


class Converted(NamedTuple):
    """Converted neurons: arguments of `ranvier.dynamics.converted_scan`."""

    threshold: Tensor
    bias: Tensor
    v_init: Tensor
    signed: bool
    binary: bool


def unfit(current: Tensor, state: ConvertedState | None, neurons: Converted, backend: Backend = "native") -> str | None:
    """Why the kernel of a backend cannot run these neurons on this input, and what to do; None if it can."""
    given = {"current": current, "threshold": neurons.threshold, "bias": neurons.bias, "v_init": neurons.v_init}
    if isinstance(state, ConvertedState):
        given |= {"state.v": state.v} | ({"state.emitted": state.emitted} if neurons.signed else {})
    if not nobody_watches(*given.values()):
        return (
            "its kernel has no gradient, and no form that a compiler or exporter could see. Call it under "
            'torch.no_grad(), or use implementation="auto".'
        )
    for name, tensor in given.items():
        if tensor.device != current.device:
            return f"{name} is on {tensor.device}, but current on {current.device}. Move it with .to({current.device})."
    if current.dtype not in DTYPES[backend]:
        return (
            f"current has dtype {current.dtype}, but its kernel takes {', '.join(map(str, DTYPES[backend]))}. "
            'Use implementation="compiled", or convert it.'
        )
    for name, tensor in given.items():
        # What is read as it lies is float32; of what is copied into tables float32 holds fewer bits too.
        if tensor.dtype == torch.float64 or (name.startswith("state") and tensor.dtype != torch.float32):
            return (
                f'{name} has dtype {tensor.dtype}, but its kernel takes torch.float32. Use implementation="reference".'
            )
    return None


def converted_scan(
    current: Tensor,
    state: ConvertedState | None,
    threshold: Tensor,
    bias: Tensor,
    v_init: Tensor,
    signed: bool = False,
    binary: bool = False,
    surrogate: Surrogate | None = None,
    *,
    implementation: Implementation = "auto",
) -> tuple[Tensor, ConvertedState]:
    """`ranvier.dynamics.converted_scan`; see there.

    Raises:
        RuntimeError: The implementation that was asked for cannot run here: there is no compiler or GPU, or there are
            gradients or a compiler, which kernels do not serve.
    """
    check_scan(current, None)
    neurons = Converted(threshold, bias, v_init, signed, binary)

    def obstacle(backend: Backend) -> str | None:
        if surrogate is not None:
            return f'converted neurons that train have no {NAMES[backend]} scan. Use implementation="compiled".'
        return unfit(current, state, neurons, backend)

    choice = choose_scan(implementation, current.device, run_size(current), obstacle)
    if choice.implementation in ("native", "triton"):
        check_converted(current, state, bias, v_init, signed)
        check_num_channels("threshold", threshold, current)
        return _kernel(choice.implementation)(current, state, neurons)
    if choice.implementation == "reference" or surrogate is not None:
        return dynamics.converted_scan(current, state, threshold, bias, v_init, signed, binary, surrogate)
    v, emitted, rows, state = begin(current, state, bias, v_init, signed)
    check_num_channels("threshold", threshold, current)
    threshold = per_channel(threshold, current[0])
    sent = torch.empty_like(current, memory_format=torch.preserve_format)
    step = _compiled_step()
    for x, b, y in zip(current.unbind(0), rows, sent.unbind(0), strict=True):
        v, emitted = step(*map(sizes_open, (x, v, emitted, threshold, b, y)), signed, binary)
    return sent, ConvertedState(v, emitted, state.step + len(current))


def _kernel(backend: str) -> Callable[[Tensor, ConvertedState | None, Converted], tuple[Tensor, ConvertedState]]:
    """That of a backend, imported where it is used: one needs Triton, and both need this file."""
    if backend == "native":
        from ranvier.kernels import native_converted

        return native_converted.run
    from ranvier.kernels import triton_converted

    return triton_converted.run


@functools.cache
def _compiled_step() -> Callable[..., tuple[Tensor, Tensor]]:
    return compile_whole(_step_into)


def _step_into(
    x: Tensor, v: Tensor, emitted: Tensor, threshold: Tensor, bias: Tensor, out: Tensor, signed: bool, binary: bool
) -> tuple[Tensor, Tensor]:
    """`converted_step` that writes what it sends into `out`, a slice of all steps."""
    y, v, emitted = converted_step(x.to(v.dtype), v, emitted, threshold, bias, signed, binary)
    out.copy_(y)
    return v, emitted
