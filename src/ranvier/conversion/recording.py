"""What a network computes, written down while it runs: each call of a torch function on data that depends on images.

The network runs on real samples, so that sizes are plain numbers and Python branches on them as ever. What the values
of the data decide cannot be written down, and is refused.
"""

import linecache
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from ranvier.nn import QCFS


class ConversionError(ValueError):
    """An ANN, or a part of one, that cannot be converted: where it is, why not, and what to do."""


@dataclass(frozen=True)
class Place:
    """Where a call stands in the model and in its source.

    Args:
        path: Of the innermost module, as in `named_modules()`; empty for the model itself.
        module: Class of that module.
        is_layer: Whether that class is one of torch or ranvier, so that its path tells what it computes.
        line: File, line number and code of the innermost line outside of torch; empty where there is none.
    """

    path: str
    module: str
    is_layer: bool
    line: str

    def __str__(self) -> str:
        """As messages have it: `layer1.0.act (GELU) at resnet.py:27, "out = self.act(out)"`."""
        module = f"{self.path} ({self.module})" if self.path else self.module
        return f"{module} at {self.line}" if self.line else module


@dataclass(eq=False)
class Value:
    """A tensor that depends on the images, as it was at one time."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(eq=False)
class Call:
    """One call of a torch function, on a batch of `num_samples` images of type `dtype`.

    `args` and `kwargs` hold a `Value` for each tensor that depends on the images; other tensors in them are constants.
    """

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: Place
    num_samples: int
    dtype: torch.dtype
    results: list[Value] = field(default_factory=list)

    def refuse(self, why: str, remedy: str) -> ConversionError:
        """The error that says where this call stands, why it cannot be converted, and what to do."""
        return ConversionError(f"{self.place}: {self.name} {why}. {remedy}")


@dataclass(frozen=True)
class Recording:
    """The calls that lead from the images to the output, in order."""

    images: Value
    output: Value
    calls: list[Call]


def record(model: nn.Module, images: Tensor) -> Recording:
    """Run `model` on `images` and write down what it computes.

    Args:
        model: In the mode to be recorded, without gradients.
        images: `[B, ...]`. The model may change them, if it works in place.

    Raises:
        ConversionError: Data decides what is computed, the output does not depend on the images through functions of
            torch, or forward itself fails.
    """
    recorder = _Recorder(images)
    with _watched(model, recorder), recorder:
        output = _run(model, images)
    value = recorder.value_of(output) if isinstance(output, Tensor) else None
    if value is None:
        raise ConversionError(
            f"{type(model).__name__}: the output does not depend on the images through functions that torch can see. "
            "Call layers and functions of torch directly: no numpy, no scripted or compiled parts."
        )
    return Recording(recorder.images, value, _leading_to(value, recorder.calls))


def _run(model: nn.Module, images: Tensor) -> Any:
    try:
        return model(images)
    except ConversionError:
        raise
    except Exception as error:
        line = _line_of(reversed(list(traceback.walk_tb(error.__traceback__))))
        raise ConversionError(
            f"{type(model).__name__} at {line}: forward takes the calibration images, but fails on {len(images)} of "
            f"them: {error}. It has to work for any number of samples: write x.flatten(1) or "
            "x.reshape(x.shape[0], ...), with no fixed batch size."
        ) from error


def _leading_to(output: Value, calls: list[Call]) -> list[Call]:
    """The calls without those whose results nothing uses."""
    needed = {output}
    kept = []
    for call in reversed(calls):
        if not needed.isdisjoint(call.results):
            kept.append(call)
            needed.update(_values_in([call.args, call.kwargs]))
    return kept[::-1]


class _Recorder(TorchFunctionMode):
    """While active, follows the images through all functions of torch.

    Tensors are told apart as Python objects. A function that changes one in place, such as `relu_`, returns the same
    object, which so has a new value wherever it is used from then on, under whatever name.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.modules: list[tuple[str, nn.Module]] = []  # those that run now, outermost first
        self._followed: dict[int, tuple[Tensor, int, Value]] = {}  # holding a tensor keeps its id from being reused
        self.tensor = images
        self.images = self._follow(images)

    def value_of(self, tensor: Tensor) -> Value | None:
        """The value that `tensor` has now; None for a constant."""
        if id(tensor) not in self._followed:
            return None
        _, version, value = self._followed[id(tensor)]
        if tensor._version != version:
            raise ConversionError(
                f"{self._place()}: a tensor that is used here was changed in place under another name, as by "
                "x[:, 0].relu_() or x.flatten(1).relu_(). Leave out the underscore, or inplace=True."
            )
        return value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        seen = (self._with_values(args), self._with_values(kwargs))
        if func.__name__ in _METADATA or not any(_values_in(seen)):
            return func(*args, **kwargs)
        call = Call(func, _name(func), *seen, self._place(), len(self.tensor), self.tensor.dtype)
        written = [tensor for tensor in (*args[:1], kwargs.get("out")) if tensor is not None]
        constants = [tensor for tensor in written if isinstance(tensor, Tensor) and self.value_of(tensor) is None]
        result = func(*args, **kwargs)
        if func.__name__ == "__get__" and not isinstance(result, Tensor):
            return result  # an attribute that tells nothing about the data: shape, dtype, device
        if result is None or any(result is constant for constant in constants):
            raise call.refuse(
                "writes into a tensor", "Compute a new one instead, as with torch.cat or torch.nn.functional.pad."
            )
        results = list(result) if isinstance(result, tuple | list) else [result]
        if not results or not all(isinstance(item, Tensor) for item in results):
            raise call.refuse(
                "turns data into a Python value, on which the rest of forward may depend",
                "A spiking network computes the same for all images: leave the value, or the branch, out of forward.",
            )
        call.results = [self._follow(item) for item in results]
        self.calls.append(call)
        return result

    def _with_values(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            value = self.value_of(argument)
            return argument if value is None else value
        if type(argument) in (tuple, list):
            return type(argument)(self._with_values(item) for item in argument)
        if isinstance(argument, dict):
            return {name: self._with_values(item) for name, item in argument.items()}
        return argument

    def _follow(self, tensor: Tensor) -> Value:
        value = Value(tuple(tensor.shape), tensor.dtype)
        self._followed[id(tensor)] = (tensor, tensor._version, value)
        return value

    def _place(self) -> Place:
        path, module = self.modules[-1]
        is_layer = path != "" and type(module).__module__.startswith(("torch.nn.", "ranvier."))
        return Place(path, type(module).__name__, is_layer, _line_of(traceback.walk_stack(None)))


_METADATA = frozenset(
    [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "element_size",
        "get_device",
        "data_ptr",
        "__len__",
        "__repr__",
        "__format__",
        "__hash__",
    ]
)
"""Functions of a tensor that tell nothing about its values, or nothing to the program."""


def _values_in(argument: Any) -> Iterator[Value]:
    """All values in an argument, however nested."""
    if isinstance(argument, Value):
        yield argument
    elif type(argument) in (tuple, list):
        for item in argument:
            yield from _values_in(item)
    elif isinstance(argument, dict):
        for item in argument.values():
            yield from _values_in(item)


def _name(function: Callable[..., Any]) -> str:
    """The name of a function, its in-place form and its overloads (`relu`, `relu_`, `relu.default`), or attribute."""
    attribute = getattr(function, "__self__", None) if function.__name__ == "__get__" else None
    name = attribute.__name__ if attribute else function.__name__
    return name if name.startswith("__") else name.split(".")[0].strip("_")


def _line_of(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The first of `frames`, innermost first, that is a line of the user's forward; empty if there is none."""
    for frame, number in frames:
        file = frame.f_code.co_filename
        if file == __file__ and frame.f_code.co_name == _run.__name__:
            break
        if file != __file__ and not file.startswith(_TORCH):
            return f'{file}:{number}, "{linecache.getline(file, number).strip()}"'
    return ""


_TORCH = str(Path(torch.__file__).parent)


@contextmanager
def _watched(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Tell the recorder which modules run, and have it see each QCFS activation as one function."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            enter = partial(_enter, recorder, path)
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(partial(_leave, recorder), always_call=True).remove)
            if type(module).forward is QCFS.forward:
                vars(module)["forward"] = partial(quantise, module)
                stack.callback(vars(module).pop, "forward")
        yield


def _enter(recorder: _Recorder, path: str, module: nn.Module, args: Any) -> None:
    recorder.modules.append((path, module))


def _leave(recorder: _Recorder, module: nn.Module, args: Any, output: Any) -> None:
    recorder.modules.pop()


def quantise(module: QCFS, x: Tensor) -> Tensor:
    """A QCFS activation as a function that torch's overrides, and with them the recorder, see as one."""
    if has_torch_function_unary(x):
        return handle_torch_function(quantise, (x,), module, x)
    return QCFS.forward(module, x)
