"""From a recipe to a trained network on disk, and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from rich.table import Table
from torch import nn

from ranvier import conversion, data, provenance
from ranvier.atomic import tuples, write_json
from ranvier.conversion import ConvertedSNN
from ranvier.data import Batches, ImageSet, ImageSplits, Normalization, StreamedImages, events
from ranvier.data.events import FrameSet, FrameSplits
from ranvier.dynamics import Triangle
from ranvier.evaluation import Activity, firing_rates
from ranvier.models import Network
from ranvier.nn.proxy import ProxyActivation
from ranvier.nn.structure import Activation
from ranvier.recipes.recipe import (
    AnnRecipe,
    EventRecipe,
    FinetuneRecipe,
    Recipe,
    SimulatedEventRecipe,
    TrainingRecipe,
    read_recipe,
)
from ranvier.training import CHECKPOINT, Precision, Progress, autocast, fit, start_processes
from ranvier.weights import load_parameters, load_tensors, save

MODEL = "model.safetensors"
RESULTS = "results.json"
EVALUATION_BATCH = 500
ACTIVITY_SAMPLES = 2000
CHOOSING_SAMPLES = 2000


@dataclass(frozen=True)
class InputFormat:
    """What a trained network expects: stored on its card, so that evaluation prepares images as training did."""

    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, splits: ImageSplits | FrameSplits) -> Self:
        """Format of a data set; mean and std are those of its training images. Frames, which are counts, have none."""
        channels, height, width = splits.train.shape
        if height != width:
            raise ValueError(
                f"images are {height}x{width}, but the networks take square ones. "
                f"Pass --image-size {max(height, width)}."
            )
        mean, std = splits.train.statistics() if isinstance(splits, ImageSplits) else ((), ())
        return cls(splits.train.classes, channels, height, tuple(mean), tuple(std))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The format that `asdict` wrote."""
        try:
            return cls(**tuples(content))
        except TypeError as error:
            raise ValueError(
                f"the input format on this card does not fit this version of ranvier ({error})."
            ) from error

    def check(self, splits: ImageSplits | FrameSplits) -> None:
        """Raise unless the images are of this kind."""
        if splits.test.classes != self.classes or splits.test.shape[0] != self.channels:
            raise ValueError(
                f"the network tells apart {len(self.classes)} classes on {self.channels} channels, but "
                f"{splits.test.name} has {splits.test.num_classes} classes and images of shape {splits.test.shape}."
            )

    def build(self, recipe: Recipe | AnnRecipe) -> Network:
        """The recipe's network for this input."""
        return recipe.build(len(self.classes), self.channels, self.image_size)

    @property
    def normalization(self) -> Normalization | None:
        """Bytes to floats; None for frames, which stay counts."""
        return Normalization(self.mean, self.std) if self.mean else None


@dataclass(frozen=True)
class Result:
    """What a training gave: the last epoch is the result, the best epoch stands beside it."""

    recipe: dict[str, Any]
    accuracy_by_step: tuple[float, ...]
    ties_by_step: tuple[float, ...]
    evaluated_on: str
    best_accuracy: float
    best_epoch: int
    epochs: int
    seconds: float
    images_per_second: float
    firing_rate: float | None
    firing_rate_by_layer: dict[str, float]
    firing_rate_samples: int
    seed: int
    device: str
    processes: int
    versions: dict[str, str]
    commit: str | None
    silent_by_step: tuple[float, ...] = ()
    """Share of samples without any output so far; empty in results of earlier versions."""

    def __rich__(self) -> Table:
        """Table for the terminal."""
        title = f"{self.recipe['name']}, {read_recipe(self.recipe).label.replace('-', ', ')}, seed {self.seed}"
        table = Table(title=title, caption=self._caption(), min_width=72)
        table.add_column("T", justify="right")
        table.add_column("accuracy %", justify="right")
        table.add_column("ties %", justify="right")
        columns = [self.accuracy_by_step, self.ties_by_step]
        if any(self.silent_by_step):
            table.add_column("silent %", justify="right")
            columns.append(self.silent_by_step)
        for t, shares in enumerate(zip(*columns, strict=True), 1):
            table.add_row(str(t), *(f"{100 * share:.2f}" for share in shares))
        return table

    def _caption(self) -> str:
        return (
            f"last of {self.epochs} epochs, {self.evaluated_on}; best epoch {self.best_epoch}: "
            f"{100 * self.best_accuracy:.2f} % at T={len(self.accuracy_by_step)}; {self.seconds:.0f} s, "
            f"{self.images_per_second:.0f} images/s, {self.device}"
        )

    def save(self, path: str | Path) -> None:
        """Write everything as json."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        content = json.loads(Path(path).read_text())
        return cls(**tuples(content))


def load_data(recipe: TrainingRecipe, source: str | None = None) -> ImageSplits | FrameSplits:
    """The images, or the frames of the recordings, of a recipe.

    With `hold_out`, part of the training set stands in for the test set. With `train_images` only so many are trained
    on; those that are held out are not among them.

    Args:
        recipe: What to load.
        source: Data set to use instead of the one that the recipe names.
    """
    source = source or recipe.data
    splits: Any = (
        _load_frames(recipe, source) if isinstance(recipe, EventRecipe) else _load_images(source, recipe.image_size)
    )
    if recipe.hold_out:
        splits = type(splits)(*splits.train.hold_out(recipe.hold_out, seed=0))
    if recipe.train_images is not None and recipe.train_images < len(splits.train):
        splits = replace(splits, train=splits.train.hold_out(recipe.train_images, seed=0)[1])
    assert isinstance(splits, ImageSplits | FrameSplits)
    return splits


def _load_images(source: str, size: int | None) -> ImageSplits:
    if not source:
        raise ValueError("the card does not say where its data are. Pass --data FOLDER_OR_HUB_ID.")
    return data.load_digits() if source == "digits" else data.load_images(source, size=size)


def _load_frames(recipe: EventRecipe, source: str) -> FrameSplits:
    """Frames of recordings; they are kept in the cache, so that they are read or simulated once."""
    if isinstance(recipe, SimulatedEventRecipe):
        recordings = data.simulated_events(_load_images(source, None), recipe.saccades)
    else:
        name = recipe.events.recordings
        folder = Path(source) if source else provenance.cache_folder() / "recordings" / name
        recordings = events.load_recordings(name, folder, download=recipe.events.download)
    return events.build_splits(recordings, recipe.frames, skip_unreadable=recipe.events.skip_unreadable)


def run(
    recipe: Recipe | AnnRecipe | FinetuneRecipe, out: str | Path, *, resume: bool = False, quiet: bool = False
) -> Result:
    """Train as the recipe says.

    Leaves in `out`: `results.json`, `model.safetensors` (weights and card), `metrics.jsonl` (a record per epoch) and
    `checkpoint.safetensors`.

    Args:
        recipe: All settings.
        out: Folder of the run.
        resume: Go on where the run in `out` stopped; starts it if there is none, and returns what it gave if it ended.
        quiet: Show nothing.

    Returns:
        The result, as written to `results.json`.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is not set or its checkpoint is gone.
        FloatingPointError: Training diverged.
        ValueError: Settings, data or checkpoint do not fit; the message says how.
    """
    out = Path(out)
    accelerator = start_processes(recipe.execution)
    finished = (out / RESULTS).exists()
    if finished and not (resume and (out / CHECKPOINT).exists()):
        raise FileExistsError(
            f"{out} holds the results of a run. Choose another --out for a new one"
            + ("." if resume else ", or pass --resume to see its results again.")
        )
    start = None
    if isinstance(recipe, FinetuneRecipe):
        start = converted_network(recipe.start)
        known = start.recipe
        recipe = replace(recipe, name=recipe.name or known.name, data=recipe.data or known.data)
    with accelerator.main_process_first():  # the others find the decoded images in the cache
        splits = load_data(recipe)
    torch.manual_seed(recipe.seed)
    model: Network | ConvertedSNN
    if isinstance(recipe, FinetuneRecipe):
        assert start is not None
        form, model = start.form, _trainable(start.model, recipe)
        form.check(splits)
    else:
        form = InputFormat.of(splits)
        model = form.build(recipe)
    augment = None if recipe.augmentation == type(recipe.augmentation)() else recipe.augmentation
    place: dict[str, Any] = {
        "normalization": form.normalization,
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "device": accelerator.device,
    }
    train = Batches(
        splits.train,
        recipe.batch_size,
        augment=augment,
        shuffle=True,
        balanced=isinstance(recipe, EventRecipe) and recipe.events.balanced,
        seed=recipe.seed,
        drop_last=True,
        **place,
    )
    test = Batches(splits.test, EVALUATION_BATCH * accelerator.num_processes, **place)
    progress = fit(
        model,
        recipe.objective,
        train,
        test,
        epochs=recipe.epochs,
        steps=None if isinstance(recipe, EventRecipe) else recipe.steps,
        optimization=recipe.optimization,
        execution=recipe.execution,
        out=out,
        resume=resume,
        run={"recipe": recipe.identity(), "input": asdict(form)},
        accelerator=accelerator,
        quiet=quiet,
    )
    if finished:
        return Result.load(out / RESULTS)
    activity = None
    if not isinstance(recipe, AnnRecipe):
        with autocast(accelerator.device, recipe.execution.precision):
            activity = firing_rates(model, sample(splits.test, form, accelerator.device), recipe.steps)
    result = _result(recipe, progress, activity, len(train) * recipe.batch_size, accelerator)
    if accelerator.is_main_process:
        card = {"recipe": recipe.to_json(), "input": asdict(form), "result": asdict(result)}
        if isinstance(model, ConvertedSNN):
            for name, neuron in model.neurons.items():
                model.network.set_submodule(name, Activation(neuron))  # without the mode of an ANN
            conversion.save(model, out / MODEL, card)
        else:
            save(model, out / MODEL, card)
        result.save(out / RESULTS)
    accelerator.end_training()
    return result


def converted_network(path: str | Path) -> "Trained":
    """A converted network on disk.

    Raises:
        ValueError: It is none.
    """
    if not str(path):
        raise ValueError("nothing to start from: pass the folder of a converted network, --start FOLDER.")
    trained = load_trained(path)
    if not isinstance(trained.model, ConvertedSNN):
        raise ValueError(f"{path} holds no converted network. Make one of an ANN first: ranvier convert {path}")
    return trained


def _trainable(model: nn.Module, recipe: FinetuneRecipe) -> ConvertedSNN:
    """A converted network with everything in it a parameter."""
    assert isinstance(model, ConvertedSNN)
    model.requires_grad_(True)
    for name, neuron in model.neurons.items():
        if 1 < len(neuron.bias) < recipe.steps:
            raise ValueError(
                f"{recipe.start} has biases for {len(neuron.bias)} steps (of {name}), but is to be trained at "
                f"{recipe.steps}. Convert the ANN with --steps {recipe.steps}, or train with fewer."
            )
        neuron.make_trainable(recipe.steps, Triangle(recipe.surrogate_width))
        if recipe.loss.method == "proxy":
            model.network.set_submodule(name, ProxyActivation(neuron, "own"))
    model.steps = recipe.steps
    return model


def _result(
    recipe: Recipe | AnnRecipe | FinetuneRecipe,
    progress: Progress,
    activity: Activity | None,
    images: int,
    accelerator: Any,
) -> Result:
    last = progress.history[-1]
    # The first epoch compiles; the rate is that of the others where there are others.
    timed = [record["train_seconds"] for record in progress.history[1:] or progress.history]
    return Result(
        recipe=recipe.to_json(),
        accuracy_by_step=tuple(last["accuracy"]),
        ties_by_step=tuple(last["ties"]),
        evaluated_on=f"{recipe.hold_out} held-out training images" if recipe.hold_out else "test set",
        best_accuracy=progress.best_accuracy,
        best_epoch=progress.best_epoch,
        epochs=progress.epoch,
        seconds=progress.seconds,
        images_per_second=images / sorted(timed)[len(timed) // 2],
        firing_rate=activity.mean_firing_rate if activity else None,
        firing_rate_by_layer={layer.name: layer.mean_firing_rate for layer in activity.layers} if activity else {},
        firing_rate_samples=activity.samples if activity else 0,
        seed=recipe.seed,
        device=provenance.device_name(accelerator.device),
        processes=accelerator.num_processes,
        versions=provenance.versions(),
        commit=provenance.commit(),
        silent_by_step=tuple(last.get("silent", ())),  # checkpoints of earlier versions lack it
    )


@dataclass(frozen=True)
class Trained:
    """A network read from disk, with the recipe it was trained by and the input it expects."""

    model: Network | ConvertedSNN
    recipe: Recipe | AnnRecipe | FinetuneRecipe | TrainingRecipe
    form: InputFormat

    @property
    def steps(self) -> int:
        """T that it was trained or converted for; 1 for an ANN."""
        if isinstance(self.model, ConvertedSNN):
            return self.model.steps
        assert isinstance(self.recipe, Recipe | AnnRecipe)
        return self.recipe.steps

    @property
    def precision(self) -> Precision:
        """Precision that it was trained in; converted networks run as they were calibrated, in float32."""
        return "float32" if self.is_calibrated else self.recipe.execution.precision

    @property
    def is_calibrated(self) -> bool:
        """Whether it was converted, and not trained since."""
        return isinstance(self.model, ConvertedSNN) and not isinstance(self.recipe, FinetuneRecipe)

    def batches(
        self, source: str | None = None, device: torch.device | str = "cpu", *, steps: int | None = None
    ) -> Batches:
        """The test images of its data set, or of another `source`, prepared as it expects them.

        Always the test set: images that a recipe held out were for choosing its settings.

        Args:
            source: Data set to use instead of its own.
            device: Where batches are wanted.
            steps: Of recordings the first so many frames; None for all.
        """
        splits = load_data(self.recipe.override(hold_out=0), source)
        self.form.check(splits)
        return Batches(
            _begun(splits.test, steps), EVALUATION_BATCH, normalization=self.form.normalization, device=device
        )

    def choosing(
        self, source: str | None = None, device: torch.device | str = "cpu", *, steps: int | None = None
    ) -> tuple[Batches, str]:
        """Images to choose a threshold on, never test images; and what they are, in words.

        Those that the recipe held out, if it did. Otherwise 2,000 training images, or a fifth of them if that is less:
        the network was trained on these, and is surer and more often right on them than on new ones.
        """
        splits = load_data(self.recipe, source)
        self.form.check(splits)
        if self.recipe.hold_out:
            images, what = splits.test, f"{len(splits.test)} training images that were held out"
            if isinstance(self.model, ConvertedSNN):
                what += " from the ANN's training (the conversion may have calibrated on some)"
        else:
            count = max(min(CHOOSING_SAMPLES, len(splits.train) // 5), 1)
            images = splits.train.hold_out(count, seed=0)[1]
            what = (
                f"{count} images that the network was trained on (it is surer and more often right there than on new "
                "ones, so more or less may be lost than allowed; a recipe with --hold-out chooses without this bias)"
            )
        images = _begun(images, steps)
        return Batches(images, EVALUATION_BATCH, normalization=self.form.normalization, device=device), what


def _begun(images: ImageSet | StreamedImages | FrameSet, steps: int | None) -> ImageSet | StreamedImages | FrameSet:
    """The images; of recordings the first `steps` frames."""
    return images.first_steps(steps) if isinstance(images, FrameSet) and steps is not None else images


def load_trained(path: str | Path) -> Trained:
    """Read a network from a run's folder, its `model.safetensors` or its `checkpoint.safetensors`.

    Raises:
        FileNotFoundError: There is neither.
        ValueError: The file is broken, foreign, or of another version.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (MODEL, CHECKPOINT) if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither {MODEL} nor {CHECKPOINT}. Is it the --out of a run?")
        path = found[0]
    tensors, card = load_tensors(path)
    if card.get("kind") == "checkpoint":
        card = card["run"]
        prefix = "model/"
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if "recipe" not in card or "input" not in card:
        raise ValueError(
            f"{path} has no recipe on its card, so the network cannot be built from it. "
            "Build the network yourself and use ranvier.weights.load(model, path)."
        )
    recipe = read_recipe(card["recipe"])
    form = InputFormat.from_json(card["input"])
    if card.get("kind") == conversion.KIND:
        return Trained(conversion.from_card(tensors, card, str(path)), recipe, form)
    if not isinstance(recipe, Recipe | AnnRecipe):
        raise ValueError(
            f"{path} is the checkpoint of a converted network in training, which is no network by itself. Finish the "
            "run with --resume; it leaves model.safetensors."
        )
    model = form.build(recipe)
    load_parameters(model, tensors, str(path))
    return Trained(model.eval(), recipe, form)


def sample(
    images: ImageSet | StreamedImages | FrameSet,
    form: InputFormat,
    device: torch.device | str,
    count: int = ACTIVITY_SAMPLES,
) -> Batches:
    """Images to measure activity on: some of every class, because data sets may be sorted by class."""
    some = images if len(images) <= count else images.hold_out(count, seed=0)[1]
    return Batches(some, EVALUATION_BATCH, normalization=form.normalization, device=device)
