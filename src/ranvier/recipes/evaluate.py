"""Measures of a network on disk: accuracy, activity, energy, early exit."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from torch import Tensor

from ranvier import evaluation, provenance
from ranvier.atomic import write_json
from ranvier.conversion import ConversionError, ConvertedSNN
from ranvier.data import Batches
from ranvier.evaluation import AccuracyByStep, Activity, Costs, EarlyExit, Energy, accuracy_by_step, firing_rates
from ranvier.evaluation.early_exit import MAX_LOSS
from ranvier.kernels import Precision, compile_whole
from ranvier.kernels.full_float32 import full_float32
from ranvier.recipes.recipe import AnnRecipe
from ranvier.recipes.trained import Trained, load_trained, sample
from ranvier.report import early_exit_curve
from ranvier.training import autocast, channels_last, lay_out

ENERGY_SAMPLES = 500


@dataclass(frozen=True)
class Evaluation:
    """Accuracy, activity and energy of a network on disk, early exit if asked for; an ANN has no spikes to count."""

    accuracy: AccuracyByStep
    activity: Activity | None
    energy: Energy | None = None
    early_exit: EarlyExit | None = None
    not_counted: str = ""
    """Why there is no energy."""

    def __rich__(self) -> Group:
        """All tables, for the terminal."""
        parts: list[RenderableType] = [self.accuracy]
        if self.activity is not None:
            parts.append(self.activity)
        if self.energy is not None:
            parts.append(self.energy.table())
        if self.not_counted:
            parts.append(f"energy was not counted: {self.not_counted}")
        if self.early_exit is not None:
            parts.append(self.early_exit)
        return Group(*parts)

    def save(self, path: str | Path) -> None:
        """Write all as json."""
        write_json(
            path,
            {
                "accuracy_by_step": self.accuracy.accuracy,
                **asdict(self),
                "energy": self.energy and self.energy.to_json(),
                "early_exit": self.early_exit and self.early_exit.to_json(),
                "versions": provenance.versions(),
            },
        )

    def plot(self, path: str | Path, *, title: str = "") -> None:
        """Draw what every threshold of early exit would give, beside fixed numbers of steps, as a PNG.

        Raises:
            ValueError: Early exit was not asked for.
        """
        if self.early_exit is None:
            raise ValueError("there is nothing to draw: early exit was not measured. Pass early_exit=True to evaluate.")
        tested, chosen = self.early_exit.testing, self.early_exit.choosing
        early_exit_curve(
            {
                "test images": (tested.curve.mean_steps, tested.curve.accuracy),
                "images chosen on": (chosen.curve.mean_steps, chosen.curve.accuracy),
            },
            chosen=(tested.mean_steps, tested.accuracy),
            by_step=tested.all_steps.accuracy,
            title=title,
            path=path,
        )


@full_float32()
def evaluate(
    path: str | Path,
    *,
    source: str | None = None,
    steps: int | None = None,
    device: torch.device | str = "cpu",
    precision: Precision | None = None,
    early_exit: bool = False,
    max_loss: float = MAX_LOSS,
) -> Evaluation:
    """Accuracy after 1 .. steps time steps, firing rates and energy of a network on disk; early exit on request.

    The threshold of early exit is chosen on the images that the recipe held out. If it held none out, it is chosen on
    training images. The network is surer of those and more often right than on new ones, so that more or less accuracy
    may be lost on test images than `max_loss`; the table says so. A recipe with `hold_out` gives an unbiased choice.
    `Evaluation.plot` draws it.
    Early exit runs the network uncompiled, since each size of batch that is left would be compiled anew. At bfloat16
    its accuracies may therefore differ a little from those of the first table.

    Args:
        path: Folder of a run, or a file of it.
        source: Data set to use instead of the one it was trained on.
        steps: T; None for that of training.
        device: Where to run.
        precision: `bfloat16`, `float32`, or `auto` for what is fast there; None for that of training.
        early_exit: Whether to measure `ranvier.evaluation.early_exit`, too.
        max_loss: Accuracy that early exit may lose on the images that it is chosen on, as a share.

    Raises:
        ValueError: Steps or data do not fit the network, or `max_loss` was set without `early_exit`.
    """
    if max_loss != MAX_LOSS and not early_exit:
        raise ValueError(
            f"max_loss is {max_loss}, but belongs to early exit, which was not asked for. Pass --early-exit as well."
        )
    provenance.check_device(device)
    trained = load_trained(path)
    steps = trained.steps if steps is None else steps
    trained.check_steps(steps)
    model = lay_out(trained.model.to(device))
    # As in training: at bfloat16 a compiled network rounds less often than an eager one, and scores differently.
    # Calibrated neurons choose for themselves, and compile for any T at once.
    whole = not trained.is_calibrated and trained.recipe.execution.compiles(torch.device(device))
    network = compile_whole(model) if whole else model
    batches = trained.batches(source, device, steps=steps)
    activity, spent, exits, not_counted = None, None, None, ""
    spiking = not isinstance(trained.recipe, AnnRecipe) or isinstance(model, ConvertedSNN)
    with autocast(torch.device(device), precision or trained.precision):
        accuracy = accuracy_by_step(network, _laid_out(batches), steps)
        if spiking:
            activity = firing_rates(model, sample(batches.images, trained.form, device, steps), steps)
    if spiking:  # spikes of the folded network in float32, as hardware would have them
        try:
            spent = evaluation.energy(model, sample(batches.images, trained.form, device, steps, ENERGY_SAMPLES), steps)
        except ConversionError as error:
            not_counted = str(error)
    if early_exit:
        choosing, chosen_on = trained.choosing(source, device, steps=steps)
        with autocast(torch.device(device), precision or trained.precision):
            exits = evaluation.early_exit(
                model,
                _laid_out(choosing),
                _laid_out(batches),
                steps=steps,
                max_loss=max_loss,
                chosen_on=chosen_on,
                energy_by_step=spent.by_step if spent else None,
            )
    return Evaluation(accuracy, activity, spent, exits, not_counted)


def energy(
    path: str | Path,
    *,
    source: str | None = None,
    steps: int | None = None,
    costs: Costs | str = "45nm",
    images: int = ENERGY_SAMPLES,
    device: torch.device | str = "cpu",
) -> Energy:
    """Operations and energy of a network on disk, from its spikes on test images.

    Args:
        path: Folder of a run, or a file of it.
        source: Data set to use instead of the one it was trained on.
        steps: T; None for that of training.
        costs: Name of a table in `ranvier.evaluation.COSTS`, or one of your own.
        images: How many test images to count on, some of every class.
        device: Where to run.

    Raises:
        ConversionError: The network has a part that cannot be traced, such as self-attention.
        ValueError: It is an ANN, or steps or data do not fit it.
    """
    provenance.check_device(device)
    trained = spiking_network(path)
    steps = trained.steps if steps is None else steps
    trained.check_steps(steps)
    model = lay_out(trained.model.to(device))
    batches = sample(trained.batches(source, device, steps=steps).images, trained.form, device, steps, images)
    return evaluation.energy(model, batches, steps, costs=costs)


def spiking_network(path: str | Path) -> Trained:
    """A network on disk that spikes.

    Raises:
        ValueError: It is an ANN.
    """
    trained = load_trained(path)
    if isinstance(trained.recipe, AnnRecipe) and not isinstance(trained.model, ConvertedSNN):
        raise ValueError(f"{path} holds an ANN, which has no spikes. Convert it first: ranvier convert {path}")
    return trained


def _laid_out(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    return ((channels_last(images), labels) for images, labels in batches)
