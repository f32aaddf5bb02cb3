"""Translations of sums, constant factors, and sums and means over axes."""

from typing import Any

from torch import Tensor, fx

from ranvier.conversion.draft import Draft, Handler, called, sample_axis, sizes, with_sizes
from ranvier.conversion.translate_layers import require_constants


def _add(draft: Draft, input: Any, other: Any, *, alpha: float = 1) -> fx.Node:
    if not isinstance(input, fx.Node):
        return _shifted(draft, _scaled(draft, other, alpha), input)
    if not isinstance(other, fx.Node):
        return _shifted(draft, input, other * alpha)
    if len(sizes(input)) != len(sizes(other)):
        raise draft.call.refuse(
            f"adds samples of shapes {list(sizes(input))} and {list(sizes(other))}, which broadcasting aligns at the "
            "last axis, so that it mixes samples",
            "Give both the same number of axes, as in x[:, :, None, None].",
        )
    return draft.function("add", input, _scaled(draft, other, alpha))


def _subtract(draft: Draft, input: Any, other: Any, *, alpha: float = 1) -> fx.Node:
    return _add(draft, input, other, alpha=-alpha)


def _subtract_from(draft: Draft, input: Any, other: Any, *, alpha: float = 1) -> fx.Node:
    return _add(draft, other, input, alpha=-alpha)


def _multiply(draft: Draft, input: Any, other: Any) -> fx.Node:
    if not isinstance(input, fx.Node):
        return _scaled(draft, other, input)
    require_constants(draft, other)
    return _scaled(draft, input, other)


def _divide(draft: Draft, input: Any, other: Any, *, rounding_mode: str | None = None) -> fx.Node:
    require_constants(draft, other)
    if rounding_mode is not None:
        raise draft.call.refuse(f"with rounding_mode={rounding_mode!r} is not linear", "Divide without rounding.")
    return _scaled(draft, input, 1 / other)


def _negate(draft: Draft, input: fx.Node) -> fx.Node:
    return _scaled(draft, input, -1)


def _scaled(draft: Draft, x: fx.Node, factor: Any) -> fx.Node:
    constant = _constant(draft, factor)
    return x if constant == 1.0 else with_sizes(draft.function("mul", x, constant), sizes(x))


def _shifted(draft: Draft, x: fx.Node, shift: Any) -> fx.Node:
    constant = _constant(draft, shift)
    return x if constant == 0.0 else draft.function("add", x, constant)


def _constant(draft: Draft, value: Tensor | float) -> fx.Node | float:
    return draft.constant(value) if isinstance(value, Tensor) else float(value)


def _over_axes(name: str) -> Handler:
    def reduce(draft: Draft, input: fx.Node, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> fx.Node:
        axes = [dim] if isinstance(dim, int) else dim
        return draft.function(name, input, [sample_axis(draft, input, axis) for axis in axes], keepdim)

    return reduce


ARITHMETIC_HANDLERS: dict[str, Handler] = {
    "add": _add,
    "mean": _over_axes("mean_axes"),
    "sum": _over_axes("sum_axes"),
    **called(_subtract, "sub", "subtract"),
    **called(_subtract_from, "rsub", "__rsub__"),
    **called(_multiply, "mul", "multiply"),
    **called(_divide, "div", "divide", "true_divide"),
    **called(_negate, "neg", "negative"),
}
