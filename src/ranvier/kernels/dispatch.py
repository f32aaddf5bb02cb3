"""Which implementation of a neuron runs, and why."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ranvier.checks import check_choice
from ranvier.provenance import cpp_compiler

Implementation = Literal["auto", "reference", "compiled"]
"""`reference` is the loop of `ranvier.dynamics`, `compiled` the same through torch.compile; `auto` chooses."""

IMPLEMENTATIONS = ("auto", "reference", "compiled")

Function = TypeVar("Function", bound=Callable[..., Any])

RECOMPILE_LIMIT = 64
"""Combinations of T, dtype, memory layout and mode that one compiled scan or network may meet in a process."""

SMALL = 2**16
"""Values per time step below which compiling (seconds, once) does not pay for what it saves (microseconds a call)."""


@dataclass(frozen=True)
class Choice:
    """The implementation that runs and the reason for it."""

    implementation: Literal["reference", "compiled"]
    reason: str


def choose(implementation: Implementation, device: torch.device, values_per_step: int) -> Choice:
    """Decide what runs for a call of this size on this device.

    The choice does not depend on T: T calls of one step run the same code as one call of T steps, which keeps the two
    equal bit for bit.

    Args:
        implementation: `auto`, or the one that must run.
        device: Where the input lives.
        values_per_step: Elements of one time step, `B * C * H * W`.

    Raises:
        ValueError: Unknown name.
        RuntimeError: `compiled` was asked for and cannot run; the message says why.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "reference":
        return Choice("reference", "asked for")
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


def explain(device: torch.device | str = "cpu", values_per_step: int = 2**20) -> str:
    """Say which implementation `auto` picks on `device` for inputs of that size, and why.

    >>> explain("cpu", values_per_step=10)
    'cpu: reference (10 values a step are fewer than 65536, compiling would not pay)'
    """
    device = torch.device(device)
    choice = _best(values_per_step, _obstacle(device.type))
    return f"{device.type}: {choice.implementation} ({choice.reason})"


def compile_whole(function: Function) -> Function:
    """Compile a scan or a network as one graph, with a count of recompilations of its own.

    torch.compile counts recompilations per line of code, so a process that trains its ninth network of one class would
    otherwise fall back to eager, or fail.

    Args:
        function: A callable or module.

    Raises:
        torch._dynamo.exc.Unsupported: At the first call, if `function` would break the graph.
    """
    return torch.compile(  # type: ignore[call-overload]  # the overloads lag behind the signature
        function, fullgraph=True, recompile_limit=RECOMPILE_LIMIT, isolate_recompiles=True
    )


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
    if device_type == "cpu" and cpp_compiler() is None:
        return (
            "torch.compile needs a C++ compiler and found none. Install one (Debian: apt-get install g++) or set CXX."
        )
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU. Install it: pip install triton."
    if device_type not in ("cpu", "cuda"):
        return f"compiling has not been tested on {device_type}."
    return None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
