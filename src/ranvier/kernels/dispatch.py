"""Which implementation of a neuron runs, and why."""

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ranvier import provenance
from ranvier.checks import check_choice

Implementation = Literal["auto", "reference", "compiled", "native", "triton"]
"""`reference` is the loop of `ranvier.dynamics`, `compiled` the same through torch.compile, `native` and `triton` one
kernel for all steps on a CPU and on a GPU; `auto` chooses."""

IMPLEMENTATIONS = ("auto", "reference", "compiled", "native", "triton")

Function = TypeVar("Function", bound=Callable[..., Any])

RECOMPILE_LIMIT = 64
"""Combinations of T, dtype, memory layout and mode that one compiled scan or network may meet in a process."""

SMALL = 2**16
"""Values per time step below which compiling (seconds, once) does not pay for what it saves (microseconds a call)."""

PAYS = {"native": 2**10, "triton": SMALL}
"""Values per time step from which one kernel for all steps is faster than the reference."""

ONE_KERNEL = "one kernel forward and one backward run all steps"


@dataclass(frozen=True)
class Choice:
    """The implementation that runs and the reason for it."""

    implementation: Literal["reference", "compiled", "native", "triton"]
    reason: str


def choose(implementation: Implementation, device: torch.device, values_per_step: int) -> Choice:
    """Decide what runs a whole network, or any function, for a call of this size on this device.

    `auto` picks no kernel for neurons alone here, but compiles: on a GPU each neuron and the normalisation before it
    then become one kernel, which saves passes over memory that a kernel for the neuron alone must make.

    The choice does not depend on T: T calls of one step run the same code as one call of T steps, which keeps the two
    equal bit for bit.

    Args:
        implementation: `auto`, or the one that must run.
        device: Where the input lives.
        values_per_step: Elements of one time step, `B * C * H * W`.

    Raises:
        ValueError: Unknown name.
        RuntimeError: The one that was asked for cannot run; the message says why.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "reference":
        return Choice("reference", "asked for")
    if implementation in ("native", "triton"):
        return _fused(implementation, device, lambda backend: None)
    if torch.compiler.is_compiling():
        return Choice("reference", "traced into the graph of the model that is being compiled, and fused there")
    obstacle = _obstacle(device.type)
    if implementation == "compiled":
        if obstacle:
            raise RuntimeError(f'implementation="compiled" cannot run on {device.type}: {obstacle}')
        return Choice("compiled", "asked for")
    choice = _best(values_per_step, obstacle)
    if choice.reason == obstacle:
        _warn_once(f"Neurons run their slower reference on {device.type}: {obstacle}")
    return choice


def choose_scan(
    implementation: Implementation,
    device: torch.device,
    values_per_step: int,
    unfit: Callable[[Literal["native", "triton"]], str | None],
) -> Choice:
    """Decide what runs one neuron over time: as `choose`, or one kernel for all steps.

    Where a model is being compiled or exported, `auto` traces the reference, as `choose` says; `native` and `triton`
    stay one operator in it, if these neurons have one. On a CPU a model that is compiled keeps `native`: it is as fast
    there as what the compiler would write, and needs half the time to compile.

    Args:
        implementation: `auto`, or the one that must run.
        device: Where the input lives.
        values_per_step: Elements of one time step, `B * C * H * W`.
        unfit: Says why the kernels of `native` or `triton` cannot run this neuron, None if they can.

    Raises:
        ValueError: Unknown name.
        RuntimeError: The one that was asked for cannot run; the message says why.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation in ("native", "triton"):
        return _fused(implementation, device, unfit)
    if implementation == "auto" and is_transformed():
        return Choice("reference", "torch.func and forward-mode differentiation pass through it alone")
    if implementation == "auto" and torch.compiler.is_compiling():
        native = device.type == "cpu" and not torch.compiler.is_exporting() and _native_compiles()
        # A size that varies is a symbol here: to compare it would compile anew for those on the other side.
        few = isinstance(values_per_step, int) and values_per_step < PAYS["native"]
        if native and not few and unfit("native") is None:
            return Choice("native", ONE_KERNEL)
    elif implementation == "auto":
        backend = _backend(device.type)
        if backend and values_per_step >= PAYS[backend] and unfit(backend) is None and _fused_obstacle(backend) is None:
            return Choice(backend, ONE_KERNEL)
    return choose(implementation, device, values_per_step)


def explain(device: torch.device | str = "cpu", values_per_step: int = 2**20) -> str:
    """Say which implementation of the neurons `auto` picks on `device` for inputs of that size, and why.

    >>> explain("cpu", values_per_step=10)
    'cpu: reference (10 values a step are fewer than 65536, compiling would not pay)'
    """
    device = torch.device(device)
    backend = _backend(device.type)
    pays = backend is not None and values_per_step >= PAYS[backend]
    obstacle = _fused_obstacle(backend) if backend and pays else None
    if backend and pays and obstacle is None:
        choice = Choice(backend, f"{ONE_KERNEL}; compiled: networks as a whole and neurons without such a kernel")
    else:
        choice = _best(values_per_step, _obstacle(device.type))
    instead = f"; not {backend}: {obstacle}" if obstacle and obstacle != choice.reason else ""
    return f"{device.type}: {choice.implementation} ({choice.reason}{instead})"


def compile_whole(function: Function) -> Function:
    """Compile a scan or a network as one graph, with a count of recompilations of its own.

    torch.compile counts recompilations per line of code, so a process that trains its ninth network of one class would
    otherwise fall back to eager, or fail.

    Args:
        function: A callable or module.

    Raises:
        torch._dynamo.exc.Unsupported: At the first call, if `function` would break the graph.
    """
    counts = {"recompile_limit": RECOMPILE_LIMIT, "isolate_recompiles": True}
    known = {name: value for name, value in counts.items() if name in inspect.signature(torch.compile).parameters}
    if not known:  # torch 2.11, which has one limit for all
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    compiled: Function = torch.compile(function, fullgraph=True, **known)  # type: ignore[call-overload]
    return compiled


def run_size(current: Tensor) -> int:
    """Elements of one time step of `[T, B, ...]`."""
    return current.numel() // max(current.shape[0], 1)


def _best(values_per_step: int, obstacle: str | None) -> Choice:
    """What `auto` picks, given what keeps torch.compile from running."""
    if values_per_step < SMALL:
        return Choice("reference", f"{values_per_step} values a step are fewer than {SMALL}, compiling would not pay")
    if obstacle:
        return Choice("reference", obstacle)
    return Choice("compiled", "the loop over time fuses to one pass over memory")


@cache
def _obstacle(device_type: str) -> str | None:
    """What keeps torch.compile from running on this kind of device, with the remedy; None if nothing does."""
    if device_type == "cpu" and provenance.cpp_compiler() is None:
        return (
            "torch.compile needs a C++ compiler and found none. Install one (Debian: apt-get install g++) or set CXX."
        )
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU. Install it: pip install triton."
    if device_type not in ("cpu", "cuda"):
        return f"compiling has not been tested on {device_type}."
    return None


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation sees a call: no kernel of ours has rules for them."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0


def _backend(device_type: str) -> Literal["native", "triton"] | None:
    """Whose kernels for all steps run on this kind of device."""
    backends: dict[str, Literal["native", "triton"]] = {"cpu": "native", "cuda": "triton"}
    return backends.get(device_type)


@cache
def _fused_obstacle(backend: Literal["native", "triton"]) -> str | None:
    """What keeps one kernel for all steps from running here, with the remedy; None if nothing does."""
    if backend == "triton":
        missing = importlib.util.find_spec("triton") is None
        return "Triton is not installed. Install it: pip install triton." if missing else None
    from ranvier.kernels import native_scan

    return native_scan.obstacle()


def _native_compiles() -> bool:
    """Asked while a network is traced, which it is without: the tracer cannot look for compilers."""
    return _fused_obstacle("native") is None


# What torch.compiler.assume_constant_result sets. Calling it would load torch's compiler with ranvier: a second more.
_native_compiles._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fused(
    backend: Literal["native", "triton"],
    device: torch.device,
    unfit: Callable[[Literal["native", "triton"]], str | None],
) -> Choice:
    """One kernel for all steps, which was asked for, or the reason why not."""
    # While a network is compiled, the tracer can import, but not look for packages and compilers.
    obstacle = None if torch.compiler.is_compiling() else _fused_obstacle(backend)
    if obstacle is None and _backend(device.type) != backend:
        obstacle = _elsewhere(backend, device.type)
    obstacle = obstacle or unfit(backend)
    if obstacle:
        raise RuntimeError(f'implementation="{backend}" cannot run on {device.type}: {obstacle}')
    return Choice(backend, "asked for")


def _elsewhere(backend: Literal["native", "triton"], device_type: str) -> str | None:
    if backend == "native":
        return 'its kernels run on CPUs. Use implementation="auto".'
    from ranvier.kernels.triton_scan import INTERPRETED

    if device_type == "cpu" and INTERPRETED:
        return None
    return (
        'its kernels run on GPUs. Use implementation="auto". To test kernels on a CPU, slowly, set TRITON_INTERPRET=1 '
        "before Python starts."
    )


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
