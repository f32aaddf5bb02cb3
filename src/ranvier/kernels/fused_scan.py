"""Scans as operators: all steps of IF, LIF, PLIF or LIFB in one kernel forward and one backward.

What is the same wherever they run stands here: which neurons and surrogates have kernels, the operators that autograd,
torch.compile and torch.export see, and how the elements of a step lie in memory. The kernels are those of
`ranvier.kernels.native_scan` on a CPU and of `ranvier.kernels.triton_scan` on a GPU.

Forward reads the input once and writes the spikes once. Backward keeps nothing but the input (and the state that came
in) and computes the potentials again. The order of operations is that of `ranvier.dynamics`, without fused
multiply-adds, so that in float32 spikes and potentials are those of the reference on a CPU, bit for bit. Gradients
agree to rounding; those of learned tensors are summed in a fixed order, and so are deterministic.

Elements of one step are visited in the order in which they lie in memory, contiguous or channels-last alike.

The operators `ranvier::fused_scan` and `ranvier::fused_scan_backward` are opaque to torch.compile and torch.export,
which keep them whole; where neither traces, an autograd function does the same in less time. A program that was
exported with them needs `import ranvier.kernels.fused_scan` where it is loaded. Gradients of gradients are not defined.
"""

# mypy: disable-error-code="no-untyped-def"
# The fakes repeat the schemas of their operators.

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ranvier import dynamics
from ranvier.dynamics import ATan, NeuronState, Rectangle, Sigmoid, Triangle
from ranvier.dynamics.scan import Step

Backend = Literal["native", "triton"]

NAMES = {"native": "native", "triton": "Triton"}
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
"""Inputs that the kernels take. They compute in float32."""

NEURONS: dict[Step, str] = {
    dynamics.if_step: "if",
    dynamics.lif_step: "lif",
    dynamics.plif_step: "plif",
    dynamics.lifb_step: "lifb",
}
"""Steps that have kernels, by the name that the operators know them by."""

SURROGATES = {
    Triangle: ("triangle", "width"),
    ATan: ("atan", "alpha"),
    Sigmoid: ("sigmoid", "alpha"),
    Rectangle: ("rectangle", "width"),
}
"""Surrogates that kernels have: the name, and the attribute that is its number."""


class Kind(NamedTuple):
    """What tells one neuron from another, as the operators pass it on: text and plain numbers."""

    neuron: str
    reset: str
    detach_reset: bool
    surrogate: str
    surrogate_number: float
    v_threshold: float
    v_burst: float
    tau: float

    @classmethod
    def of(cls, step: Step, params: Any) -> "Kind":
        """The kind of a neuron with this step and these parameters."""
        neuron = NEURONS[step]
        surrogate, number = SURROGATES[type(params.surrogate)]
        return cls(
            neuron,
            params.reset,
            params.detach_reset,
            surrogate,
            float(getattr(params.surrogate, number)),
            float(params.v_threshold),
            float(params.v_burst) if neuron == "lifb" else 0.0,
            float(params.tau) if neuron in ("lif", "lifb") else 1.0,
        )

    @property
    def charge(self) -> tuple[str, float]:
        """How the potential is charged, `sum`, `product` or `quotient`, and the number that the difference takes."""
        if self.neuron == "if":
            return "sum", 1.0
        if self.neuron == "plif" or math.frexp(self.tau)[0] == 0.5:  # a power of two: quotient and product are equal
            return "product", 1 / self.tau
        return "quotient", self.tau


KIND = (
    "str neuron, str reset, bool detach_reset, str surrogate, float surrogate_number, float v_threshold, "
    "float v_burst, float tau"
)
"""A `Kind` in the schema of an operator."""


class View(NamedTuple):
    """A step in memory as `[rows, columns]`: where channels matter, one column lies in one channel."""

    rows: int
    columns: int
    inner: int
    """Neighbouring columns of one channel."""

    @classmethod
    def of(cls, current: Tensor, by_channel: bool) -> "View":
        """The view of each step of `current`, `[T, B, ...]`, whose steps are dense."""
        numel = current[0].numel()
        if not by_channel or current.shape[2] == 1:
            return cls(1, numel, numel)
        inner = current.stride(2)
        columns = current.shape[2] * inner
        return cls(numel // columns, columns, inner)


class Norm(NamedTuple):
    """What a normalisation makes of the input before neurons receive it: `current scale + shift`.

    Each is `[S, C]`, float32: a number for each channel (S = 1), or for each step and channel (S = T).
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    """That backward takes deviations from."""


class Job(NamedTuple):
    """What a kernel is given to work on. All steps of all tensors are dense, and lie in memory as those of `current`.

    Attributes:
        kind: The neuron.
        view: A step in memory.
        current: Input, `[T, B, ...]`; steps may lie apart.
        state: Potential that came in, `[B, ...]` float32, or None.
        rate: Leak that is learned, `[1]` float32, or None.
        excess: What a burst sends beyond a spike, `[C]` float32, or None.
        norm: What neurons receive instead of `current`, on a CPU; None if it is that.
    """

    kind: Kind
    view: View
    current: Tensor
    state: Tensor | None
    rate: Tensor | None
    excess: Tensor | None
    norm: Norm | None = None


class Kernels(Protocol):
    """What a backend has: functions that fill the tensors that they are given."""

    def forward(self, job: Job, spikes: Tensor, end: Tensor) -> None:
        """Write the spikes `[T, B, ...]` and the potential after the last step, `[B, ...]`."""

    def backward(
        self,
        job: Job,
        grad_spikes: Tensor | None,
        grad_end: Tensor | None,
        grad_current: Tensor,
        grad_state: Tensor | None,
    ) -> Tensor | None:
        """Write the gradients of `current` and `state`; return that of `rate` or `excess`, the one there is."""


def unfit(
    backend: Backend, step: Step, current: Tensor, state: NeuronState | None, params: Any, learned: Sequence[Tensor]
) -> str | None:
    """Why the kernels cannot run this neuron on this input, and what to do; None if they can.

    Args:
        backend: Whose kernels.
        step: Step function; those of IF, LIF, PLIF and LIFB have kernels.
        current: Input, `[T, B, ...]`.
        state: Carried from an earlier call, or None.
        params: Parameters of `step`.
        learned: Tensors that train.
    """
    scan = f"the {NAMES[backend]} scan"
    if step not in NEURONS:
        return (
            f"{scan} has kernels for IF, LIF, PLIF and LIFB, not for {step.__name__}. "
            'Use implementation="compiled", which writes one for any step function.'
        )
    dtypes = DTYPES[backend]
    for name, tensor in [("current", current), *([] if state is None else [("state.v", state.v)]), *_named(learned)]:
        if tensor.device != current.device:
            return f"{name} is on {tensor.device}, but current on {current.device}. Move it with .to({current.device})."
        if tensor.dtype not in dtypes:
            return (
                f"{name} has dtype {tensor.dtype}, but {scan} takes "
                f'{", ".join(map(str, dtypes))}. Use implementation="compiled", or convert it.'
            )
    if type(params.surrogate) not in SURROGATES:
        return (
            f"{scan} does not know the surrogate {type(params.surrogate).__name__}, only "
            f'{", ".join(surrogate.__name__ for surrogate in SURROGATES)}. Use implementation="compiled".'
        )
    if NEURONS[step] == "plif" and learned[0].numel() != 1:
        return (
            f"decay has shape {list(learned[0].shape)}, but {scan} takes one for the layer. "
            'Use implementation="compiled".'
        )
    return None


def _named(learned: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((f"learned tensor {number}", tensor) for number, tensor in enumerate(learned, 1))


def fused_scan(
    backend: Backend, step: Step, current: Tensor, state: NeuronState | None, params: Any, *learned: Tensor
) -> tuple[Tensor, NeuronState]:
    """`ranvier.dynamics.scan` for a step and an input that `unfit` has nothing against.

    Args:
        backend: Whose kernels run: `native` on a CPU, `triton` on a GPU.
        step: `if_step`, `lif_step`, `plif_step` or `lifb_step`.
        current: Input, `[T, B, ...]`. Copied if the elements of a step are not dense in memory.
        state: Carried from an earlier call, or None for rest.
        params: Parameters of `step`.
        learned: Tensors that train.

    Returns:
        Spikes `[T, B, ...]`, dtype of `current`, each step in memory as that of `current`; the state after step T.

    Raises:
        ValueError: `current` is not `[T, B, C, ...]` with a burst strength for each channel.
    """
    neuron = NEURONS[step]
    rate = excess = None
    if neuron == "plif":
        rate = torch.sigmoid(learned[0]).float().reshape(1)
    if neuron == "lifb":
        if current.ndim < 3 or current.shape[2] != len(learned[0]):
            return dynamics.lifb_scan(current, state, params, learned[0])  # raises, and says what is wrong
        excess = (learned[0] - 1).float()
    kind = Kind.of(step, params)
    v = None if state is None else state.v.float()
    if v is not None and not torch.compiler.is_compiling() and v.is_inference():
        v = v.clone()  # autograd keeps no tensor that was made in inference mode
    if nobody_watches(current, v, rate, excess):
        return make_scan(current, v, rate, excess, backend, kind)
    if is_traced(current, v, rate, excess):
        spikes, end = _scan_operator(current, v, rate, excess, backend, *kind)
    else:
        spikes, end = _Scan.apply(current, v, rate, excess, backend, kind)
    return spikes, NeuronState(end)


def nobody_watches(*tensors: Tensor | None) -> bool:
    """Whether neither autograd, backward or forward, nor what traces or batches calls has to see a scan."""
    if is_traced(*tensors) or torch.autograd.forward_ad._current_level >= 0:
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors if tensor is not None))


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether something that traces or batches calls watches, which wants an operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
        or torch._C._functorch.maybe_current_level() is not None
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors if tensor is not None)
    )


def make_scan(
    current: Tensor,
    state: Tensor | None,
    rate: Tensor | None,
    excess: Tensor | None,
    backend: str,
    kind: Kind,
    sends_bytes: bool = False,
) -> tuple[Tensor, NeuronState]:
    """The scan itself, which neither autograd nor a compiler sees; with `sends_bytes`, native, of spikes 0 or 1."""
    current = dense(current)
    spikes, end = outputs(current, torch.uint8 if sends_bytes else current.dtype)
    if end.numel() > 0:
        _kernels(backend).forward(_job(kind, current, end, state, rate, excess), spikes, end)
    return spikes, NeuronState(end)


class _Scan(torch.autograd.Function):
    """The operators below without what makes them operators, which costs 50 us a call."""

    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        state: Tensor | None,
        rate: Tensor | None,
        excess: Tensor | None,
        backend: str,
        kind: Kind,
    ) -> tuple[Tensor, Tensor]:
        """Spikes, and the potential after the last step."""
        _setup_context(ctx, (current, state, rate, excess, backend, kind), None)
        spikes, end = make_scan(current, state, rate, excess, backend, kind)
        return spikes, end.v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_end: Tensor | None) -> tuple[Any, ...]:
        """Gradients of what forward was given."""
        current, state, rate, excess = ctx.saved_tensors
        backend, kind = ctx.others
        given = [gradient for gradient in (grad_spikes, grad_end) if gradient is not None]
        if not given:
            return (None,) * 6
        # Batches of gradients (is_grads_batched) have no memory of their own, and want the operator too.
        if is_traced(current, *given) or not all(map(torch._C._has_storage, given)):
            gradients = _scan_backward_operator(grad_spikes, grad_end, current, state, rate, excess, backend, *kind)
        else:
            gradients = _gradients(grad_spikes, grad_end, current, state, rate, excess, backend, kind)
        grad_current, grad_state, grad_learned = gradients
        return (
            grad_current,
            None if state is None else grad_state,
            None if rate is None else grad_learned,
            None if excess is None else grad_learned,
            None,
            None,
        )


# The operators. Their schemas hold tensors and plain values only.


@torch.library.custom_op(
    "ranvier::fused_scan",
    mutates_args=(),
    schema=f"(Tensor current, Tensor? state, Tensor? rate, Tensor? excess, str backend, {KIND}) -> (Tensor, Tensor)",
)
def _scan_operator(
    current: Tensor,
    state: Tensor | None,
    rate: Tensor | None,
    excess: Tensor | None,
    backend: str,
    *kind: Any,
) -> tuple[Tensor, Tensor]:
    spikes, end = make_scan(current, state, rate, excess, backend, Kind(*kind))
    return spikes, end.v


@_scan_operator.register_fake
def _(current, state, rate, excess, backend, *_kind):
    return outputs(dense(current))


@torch.library.custom_op(
    "ranvier::fused_scan_backward",
    mutates_args=(),
    schema=(
        "(Tensor? grad_spikes, Tensor? grad_end, Tensor current, Tensor? state, Tensor? rate, Tensor? excess, "
        f"str backend, {KIND}) -> (Tensor, Tensor, Tensor)"
    ),
)
def _scan_backward_operator(
    grad_spikes: Tensor | None,
    grad_end: Tensor | None,
    current: Tensor,
    state: Tensor | None,
    rate: Tensor | None,
    excess: Tensor | None,
    backend: str,
    *kind: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of current, state and the learned tensor; of the last two empty ones where there is none."""
    grad_current, *others = _gradients(grad_spikes, grad_end, current, state, rate, excess, backend, Kind(*kind))
    nothing = current.new_empty(0, dtype=torch.float32)
    grad_state, grad_learned = (nothing.clone() if each is None else each for each in others)
    return grad_current, grad_state, grad_learned


def _gradients(
    grad_spikes: Tensor | None,
    grad_end: Tensor | None,
    current: Tensor,
    state: Tensor | None,
    rate: Tensor | None,
    excess: Tensor | None,
    backend: str,
    kind: Kind,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of current, state and the learned tensor; None where there is none."""
    current = dense(current)
    grad_current, end = outputs(current)
    learned = excess if rate is None else rate
    grad_state = None if state is None else torch.empty_like(end)
    grad_learned = None if learned is None else torch.zeros_like(learned)
    if end.numel() > 0:
        grad_learned = _kernels(backend).backward(
            _job(kind, current, end, state, rate, excess),
            None if grad_spikes is None else laid_out_as(end, grad_spikes),
            None if grad_end is None else laid_out_as(end, grad_end),
            grad_current,
            grad_state,
        )
    return grad_current, grad_state, grad_learned


@_scan_backward_operator.register_fake
def _(grad_spikes, grad_end, current, state, rate, excess, backend, *_kind):
    grad_current, end = outputs(dense(current))
    learned = excess if rate is None else rate
    return (
        grad_current,
        end.new_empty(0) if state is None else end,
        end.new_empty(0) if learned is None else torch.empty_like(learned),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.others = inputs[4:]
    ctx.set_materialize_grads(False)  # the state's is mostly absent, and zeros would be read


def _backward(ctx: Any, grad_spikes: Tensor | None, grad_end: Tensor | None) -> tuple[Any, ...]:
    current, state, rate, excess = ctx.saved_tensors
    grad_current = grad_state = grad_learned = None
    if grad_spikes is not None or grad_end is not None:
        grad_current, grad_state, grad_learned = _scan_backward_operator(
            grad_spikes, grad_end, current, state, rate, excess, *ctx.others
        )
    return (
        grad_current,
        None if state is None else grad_state,
        None if rate is None else grad_learned,
        None if excess is None else grad_learned,
        *[None] * len(ctx.others),
    )


_scan_operator.register_autograd(_backward, setup_context=_setup_context)


def _kernels(backend: str) -> Kernels:
    """The module of a backend, imported where it is used: one needs Triton, and both need this file."""
    if backend == "native":
        from ranvier.kernels import native_scan

        return native_scan
    from ranvier.kernels import triton_scan

    return triton_scan


def _job(
    kind: Kind, current: Tensor, end: Tensor, state: Tensor | None, rate: Tensor | None, excess: Tensor | None
) -> Job:
    state = None if state is None else laid_out_as(end, state)
    return Job(kind, View.of(current, excess is not None), current, state, rate, excess)


def dense(current: Tensor) -> Tensor:
    """`current`, or a contiguous copy where the elements of a step are not dense in memory; steps may lie anywhere."""
    expected = 1
    axes = [axis for axis in range(1, current.ndim) if current.shape[axis] != 1]
    for axis in sorted(axes, key=current.stride):
        if current.stride(axis) != expected:
            return current.contiguous()
        expected *= current.shape[axis]
    return current


def outputs(current: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """New memory for all steps and for one, in float32: each step as in `current`, where steps may lie apart."""
    shape, step = current.shape[1:], current.stride()[1:]
    return all_steps(current, dtype), current.new_empty_strided(shape, step, dtype=torch.float32)


def all_steps(current: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """New memory for all steps: each as in `current`, where steps may lie apart."""
    return current.new_empty_strided(current.shape, (current[0].numel(), *current.stride()[1:]), dtype=dtype)


def laid_out_as(step: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, one step or all, or a copy whose steps lie in memory as `step` does."""
    theirs = zip(tensor.stride()[-step.ndim :], step.stride(), step.shape, strict=True)
    if all(there == here or size == 1 for there, here, size in theirs):
        return tensor
    strides = step.stride() if tensor.ndim == step.ndim else (step.numel(), *step.stride())
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)
