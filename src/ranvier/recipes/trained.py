"""Networks on disk: the recipe that they were trained by, the input that they expect, and the data that both mean."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from ranvier import conversion, data, provenance
from ranvier.atomic import tuples
from ranvier.conversion import ConvertedSNN
from ranvier.data import Batches, ImageSet, ImageSplits, Normalization, StreamedImages, evaluation_batch_size, events
from ranvier.data.events import FrameSet, FrameSplits
from ranvier.kernels import Precision
from ranvier.models import Network
from ranvier.recipes.recipe import (
    AnnRecipe,
    EventRecipe,
    FinetuneRecipe,
    Recipe,
    SimulatedEventRecipe,
    TrainingRecipe,
    read_recipe,
)
from ranvier.training import CHECKPOINT
from ranvier.weights import load_parameters, load_tensors

MODEL = "model.safetensors"
RESULTS = "results.json"
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
        """Raise unless the images are of this kind and size."""
        channels, height, width = splits.test.shape
        if splits.test.classes != self.classes or channels != self.channels:
            raise ValueError(
                f"the network tells apart {len(self.classes)} classes on {self.channels} channels, but "
                f"{splits.test.name} has {splits.test.num_classes} classes and images of shape {splits.test.shape}."
            )
        size = self.image_size
        if (height, width) != (size, size):
            raise ValueError(
                f"the network takes images of {size}x{size} pixels, but those of {splits.test.name} have "
                f"{height}x{width}. Train it further with --image-size {size}, or bring images of that size."
            )

    def build(self, recipe: Recipe | AnnRecipe) -> Network:
        """The recipe's network for this input."""
        return recipe.build(len(self.classes), self.channels, self.image_size)

    @property
    def normalization(self) -> Normalization | None:
        """Bytes to floats; None for frames, which stay counts."""
        return Normalization(self.mean, self.std) if self.mean else None


def load_data(
    recipe: TrainingRecipe, source: str | None = None, *, keep_test_set: bool = False
) -> ImageSplits | FrameSplits:
    """The images, or the frames of the recordings, of a recipe.

    With `hold_out`, part of the training set stands in for the test set. With `train_images` only so many are trained
    on; those that are held out are not among them.

    Args:
        recipe: What to load.
        source: Data set to use instead of the one that the recipe names.
        keep_test_set: Whether the test set stays what it is also with `hold_out`; what is held out is then in neither
            part.
    """
    source = source or recipe.data
    splits: Any = (
        _load_frames(recipe, source) if isinstance(recipe, EventRecipe) else _load_images(source, recipe.image_size)
    )
    if recipe.hold_out:
        rest, held_out = splits.train.hold_out(recipe.hold_out, seed=0)
        splits = type(splits)(rest, splits.test if keep_test_set else held_out)
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


@dataclass(frozen=True)
class Trained:
    """A network read from disk, with the recipe it was trained by and the input it expects."""

    model: Network | ConvertedSNN
    recipe: Recipe | AnnRecipe | FinetuneRecipe | TrainingRecipe
    form: InputFormat
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """All that the file says of the network."""

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

    @property
    def held_out(self) -> int:
        """Training images that nothing which made the network has seen: no training, and no calibration either."""
        # A conversion states it on its card; those of earlier versions calibrated on held-out images, too.
        return int(self.card.get("held_out", 0)) if isinstance(self.model, ConvertedSNN) else self.recipe.hold_out

    def check_steps(self, steps: int) -> None:
        """Raise if the network has biases for fewer steps. One whose biases do not depend on the step may run on.

        Raises:
            ValueError: It was converted, or trained further, for fewer.

        Warns:
            UserWarning: It forgets what its readout said before.
        """
        if not isinstance(self.model, ConvertedSNN):
            return
        rows = min((len(neuron.bias) for neuron in self.model.neurons.values() if len(neuron.bias) > 1), default=steps)
        if steps > rows:
            again = " and train that further" if isinstance(self.recipe, FinetuneRecipe) else ""
            raise ValueError(
                f"the network has biases for steps 1 to {rows}, but {steps} steps were asked for. Take at most --steps "
                f"{rows}, or convert the ANN with --steps {steps}{again}."
            )
        if steps > self.model.steps and self.model.readout_decay < 1:
            warnings.warn(
                f"{steps} steps were asked for, but the network has a readout that forgets, whose decay of "
                f"{self.model.readout_decay:g} was chosen for {self.model.steps}: more gain little. Convert the ANN "
                f"with --steps {steps}.",
                stacklevel=2,
            )

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
        return self._batches(splits.test, steps, device)

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
            if self.held_out != self.recipe.hold_out:
                what += " from the ANN's training (what came after it may have seen some)"
        else:
            count = max(min(CHOOSING_SAMPLES, len(splits.train) // 5), 1)
            images = splits.train.hold_out(count, seed=0)[1]
            # Of a network that others trained nobody knows.
            trained = "may have been trained" if type(self.recipe) is TrainingRecipe else "was trained"
            what = (
                f"{count} images that the network {trained} on (it is surer and more often right there than on new "
                "ones, so more or less may be lost than allowed; a recipe with --hold-out chooses without this bias)"
            )
        return self._batches(images, steps, device), what

    def _batches(
        self, images: ImageSet | StreamedImages | FrameSet, steps: int | None, device: torch.device | str
    ) -> Batches:
        size = evaluation_batch_size(self.steps if steps is None else steps, device, image_size=self.form.image_size)
        return Batches(_begun(images, steps), size, normalization=self.form.normalization, device=device)


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
        return Trained(conversion.from_card(tensors, card, str(path)), recipe, form, card)
    if not isinstance(recipe, Recipe | AnnRecipe):
        raise ValueError(
            f"{path} is the checkpoint of a converted network in training, which is no network by itself. Finish the "
            "run with --resume; it leaves model.safetensors."
        )
    model = form.build(recipe)
    load_parameters(model, tensors, str(path))
    return Trained(model.eval(), recipe, form, card)


def sample(
    images: ImageSet | StreamedImages | FrameSet,
    form: InputFormat,
    device: torch.device | str,
    steps: int,
    count: int = ACTIVITY_SAMPLES,
) -> Batches:
    """Images to measure activity of T steps on: some of every class, because data sets may be sorted by class."""
    some = images if len(images) <= count else images.hold_out(count, seed=0)[1]
    size = evaluation_batch_size(steps, device, image_size=form.image_size)
    return Batches(some, size, normalization=form.normalization, device=device)
