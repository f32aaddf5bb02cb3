"""From a trained ANN on disk to a spiking network on disk."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console, Group
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from ranvier import conversion, provenance
from ranvier.atomic import write_json
from ranvier.checks import check_count
from ranvier.conversion import Account, ConvertedSNN, Settings
from ranvier.conversion.bias import Bias
from ranvier.conversion.threshold import Threshold
from ranvier.data import Batches, ImageSplits, evaluation_batch_size
from ranvier.evaluation import AccuracyByStep, accuracy_by_step
from ranvier.kernels.full_float32 import full_float32
from ranvier.models import Network
from ranvier.recipes.idle import warn_of_idle_conversion_settings
from ranvier.recipes.recipe import TrainingRecipe
from ranvier.recipes.trained import MODEL, RESULTS, InputFormat, load_data, load_trained
from ranvier.training import channels_last, lay_out
from ranvier.weights import load_foreign_tensors, load_parameters

LAYOUT = "[T, B, ...]: one image [B, ...] for all steps, or a sequence [T, B, ...], gives logits [T, B, K]"
"""Order of axes of all networks, as cards state it."""


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion gave: test accuracy at every step beside that of the ANN, and the account.

    Attributes:
        name: Of the ANN.
        ann_accuracy: Of the ANN, on the same images.
        accuracy: Of the spiking network.
        report: What was chosen and lost.
        out: Folder of the network.
    """

    name: str
    ann_accuracy: float
    accuracy: AccuracyByStep
    report: Account
    out: Path

    def __rich__(self) -> Group:
        """Tables for the terminal, accuracy last."""
        table = Table(
            title=f"{self.name}, test accuracy (n = {self.accuracy.total})",
            caption=f"the ANN has {100 * self.ann_accuracy:.2f} % on the same images",
            min_width=72,
        )
        for title in ("T", "accuracy %", "to the ANN", "ties %"):
            table.add_column(title, justify="right")
        for t, accuracy in enumerate(self.accuracy, 1):
            ties = self.accuracy.ties[t - 1] / self.accuracy.total
            lost = 100 * (accuracy - self.ann_accuracy)
            table.add_row(str(t), f"{100 * accuracy:.2f}", f"{lost:+.2f}", f"{100 * ties:.2f}")
        return Group(self.report.__rich__(), table)

    def save(self, path: str | Path) -> None:
        """Write everything as json."""
        write_json(
            path,
            {
                "name": self.name,
                "ann_accuracy": self.ann_accuracy,
                "accuracy_by_step": self.accuracy.accuracy,
                **asdict(self.accuracy),
                "report": self.report.to_json(),
                "versions": provenance.versions(),
                "commit": provenance.commit(),
            },
        )


@full_float32()
def convert(
    ann: str,
    out: str | Path,
    *,
    steps: int,
    weights: str | Path | None = None,
    data: str | None = None,
    threshold: Threshold | Literal["auto"] = "mmse",
    bias: Bias | Literal["auto"] = "ftbc",
    signed: bool = False,
    refit: bool | None = None,
    leaky: bool | None = None,
    images: int = 2600,
    test_images: int | None = None,
    settings: Settings | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> ConversionResult:
    """Convert an ANN on disk and score the result on the test set.

    Leaves in `out`: `model.safetensors` (the network, which needs no code of the ANN), `results.json` and `errors.png`.

    Args:
        ann: Folder or file of an ANN that a recipe trained, or `package.module:factory`, a function without arguments
            that returns a module, with weights that it loads itself or with `weights`.
        out: Folder for the network.
        steps: T.
        weights: Safetensors file with the parameters of what the factory builds; None keeps those that it has.
        data: Data set; None for that of the recipe.
        threshold: As in `ranvier.conversion.convert`.
        bias: As there.
        signed: As there.
        refit: As there.
        leaky: As there.
        images: How many training images to calibrate on, some of every class and none that the recipe held out: 600
            of them, or three in five if there are fewer, are fitted on, and the others decide between settings.
        test_images: Score on the first so many test images only; None for all.
        settings: Fine print.
        image_size: Resize images to this height and width, for the factory's network; None keeps them.
        mean: Of each channel, as the factory's network was trained with; None takes it from the training images.
        std: Likewise.
        device: Where to run.
        quiet: Show nothing.

    Raises:
        FileExistsError: `out` holds results already.
        ValueError: ANN, weights or data do not fit each other.
    """
    out = Path(out)
    if (out / RESULTS).exists():
        raise FileExistsError(f"{out} holds the results of a run. Choose another --out.")
    check_count("--images", images)
    if test_images is not None:
        check_count("--test-images", test_images)
    provenance.check_device(device)
    warn_of_idle_conversion_settings(settings or Settings(), steps, threshold, bias, leaky=leaky)
    source = _load_ann(ann, weights, data, image_size, mean, std)
    splits = source.splits
    normalization = source.form.normalization
    count = min(images, len(splits.train) - 1)
    _, chosen = splits.train.hold_out(count, seed=(settings or Settings()).seed)
    place: dict[str, Any] = {"normalization": normalization, "device": device}
    single, several = (evaluation_batch_size(t, device, image_size=source.form.image_size) for t in (1, steps))
    calibration = Batches(chosen, single, **place)
    model = lay_out(source.model.to(device))
    snn = conversion.convert(
        model,
        ((channels_last(x), y) for x, y in calibration),
        steps=steps,
        threshold=threshold,
        bias=bias,
        signed=signed,
        refit=refit,
        leaky=leaky,
        settings=settings,
        progress=not quiet,
    )
    assert snn.report is not None
    test = splits.test if test_images is None else splits.test.first(test_images)
    batches = Batches(test, single, **place)
    ann_accuracy = accuracy_by_step(_OneStep(model), _shown(batches, "scoring the ANN", quiet)).final
    batches = Batches(test, several, **place)
    accuracy = accuracy_by_step(lay_out(snn), _shown(batches, "scoring the spiking network", quiet), steps)
    result = ConversionResult(source.name, ann_accuracy, accuracy, snn.report, out)
    card = {
        "recipe": source.recipe.to_json(),
        "input": asdict(source.form),
        "ann": source.name,
        "held_out": source.recipe.hold_out,
        "result": {"accuracy_by_step": accuracy.accuracy, "ann_accuracy": ann_accuracy, "total": accuracy.total},
        **describe_neurons(snn),
        "layout": LAYOUT,
        "seed": (settings or Settings()).seed,
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }
    conversion.save(snn, out / MODEL, card)
    snn.report.plot(out / "errors.png")
    result.save(out / RESULTS)
    return result


def describe_neurons(snn: ConvertedSNN) -> dict[str, Any]:
    """The neurons of a converted network in plain words and numbers, as its card states them."""
    return {
        "neuron": "if",
        "reset": "soft",
        "v_threshold": {name: [x.item() for x in neuron.threshold.aminmax()] for name, neuron in snn.neurons.items()},
    }


class _OneStep(nn.Module):
    """An ANN as a network of one step, as accuracy is measured."""

    def __init__(self, ann: nn.Module) -> None:
        super().__init__()
        self.ann = ann

    def forward(self, images: Tensor, steps: int | None) -> Tensor:
        """Logits `[1, B, K]`."""
        if isinstance(self.ann, Network):
            logits: Tensor = self.ann(images, 1)
            return logits
        return self.ann(images).unsqueeze(0)


@dataclass(frozen=True)
class _Source:
    """An ANN, what is known of its training, its data, and what to call it."""

    model: nn.Module
    recipe: TrainingRecipe
    form: InputFormat
    splits: ImageSplits
    name: str


def _load_ann(
    ann: str,
    weights: str | Path | None,
    data: str | None,
    image_size: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> _Source:
    if ":" in ann and not Path(ann).exists():
        return _load_factory(ann, weights, data, image_size, mean, std)
    if not Path(ann).exists():
        raise FileNotFoundError(
            f"{ann} does not exist. Pass the folder or file of an ANN that ranvier trained, or package.module:factory, "
            "with a colon before the function."
        )
    for name, value in (("weights", weights), ("image-size", image_size), ("mean", mean), ("std", std)):
        if value is not None:
            raise ValueError(
                f"--{name} is for an ANN given as package.module:factory; {ann} is a file or folder that has its own."
            )
    trained = load_trained(ann)
    if isinstance(trained.model, ConvertedSNN):
        raise ValueError(f"{ann} is a converted network already. Pass the ANN that it was made from.")
    # Images that the recipe held out stay unseen, so that more can be chosen on them; the test set is the test set.
    splits = load_data(trained.recipe, data, keep_test_set=True)
    trained.form.check(splits)
    assert isinstance(splits, ImageSplits)  # recordings are no data of ANNs
    return _Source(trained.model, trained.recipe, trained.form, splits, trained.recipe.label)


def _load_factory(
    ann: str,
    weights: str | Path | None,
    data: str | None,
    image_size: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> _Source:
    module_name, _, factory_name = ann.partition(":")
    if data is None:
        raise ValueError(f"{ann} names a function that builds a network. Pass --data FOLDER_OR_HUB_ID as well.")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: the user's own modules lie where they work
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cannot import {module_name!r} ({error}). ANN is a folder or file of a run, or package.module:factory; "
            "run ranvier in the folder that holds the package, or install it."
        ) from error
    finally:
        sys.path.pop(0)
    factory: Callable[[], Any] | None = getattr(module, factory_name, None)
    if not callable(factory):
        raise ValueError(f"{module_name} has no function {factory_name!r}. Pass package.module:factory.")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ValueError(
            f"{ann} cannot be called without arguments ({error}). Write a function that passes them: "
            f"def my_{factory_name}(): return {factory_name}(...)."
        ) from error
    model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{ann}() returned a {type(model).__name__}, but must return a torch.nn.Module.")
    if weights is not None:
        load_parameters(model, load_foreign_tensors(weights), str(weights))
    recipe = TrainingRecipe(name=factory_name, data=data, image_size=image_size)
    splits = load_data(recipe)
    assert isinstance(splits, ImageSplits)
    form = InputFormat.of(splits)
    form = replace(form, mean=mean or form.mean, std=std or form.std)
    return _Source(model.eval(), recipe, form, splits, factory_name)


def _shown(batches: Batches, what: str, quiet: bool) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches in the layout that convolutions are fastest on, with a progress bar where there is a terminal."""
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    laid_out = ((channels_last(x), y) for x, y in batches)
    return track(laid_out, what, len(batches), console=console, transient=True, disable=hidden)
