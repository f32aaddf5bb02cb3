"""From a recipe to a trained network on disk."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from rich.table import Table

from ranvier import provenance
from ranvier.atomic import tuples, write_json
from ranvier.conversion import ConvertedSNN
from ranvier.data import Batches, evaluation_batch_size
from ranvier.data.events import EventMix
from ranvier.evaluation import Activity, firing_rates
from ranvier.evaluation.accuracy import add_accuracy_columns
from ranvier.models import Network
from ranvier.recipes.finetune import finish, prepare
from ranvier.recipes.idle import warn_of_idle_settings
from ranvier.recipes.recipe import AnnRecipe, EventRecipe, FinetuneRecipe, Recipe, read_recipe
from ranvier.recipes.trained import (
    MODEL,
    RESULTS,
    InputFormat,
    Trained,
    load_data,
    load_trained,
    sample,
)
from ranvier.training import CHECKPOINT, Progress, autocast, end_processes, fit, start_processes
from ranvier.weights import save

__all__ = ["MODEL", "RESULTS", "InputFormat", "Result", "Trained", "load_data", "load_trained", "run", "sample"]


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
        add_accuracy_columns(table, self.accuracy_by_step, self.ties_by_step, self.silent_by_step)
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
    recipe = replace(recipe, execution=recipe.execution.settled(accelerator.device))
    finished = (out / RESULTS).exists()
    if finished and not (resume and (out / CHECKPOINT).exists()):
        raise FileExistsError(
            f"{out} holds the results of a run. Choose another --out for a new one"
            + ("." if resume else ", or pass --resume to see its results again.")
        )
    if accelerator.is_main_process:
        warn_of_idle_settings(recipe)
    start = prepare(recipe) if isinstance(recipe, FinetuneRecipe) else None
    if start is not None:
        recipe = start.recipe
    with accelerator.main_process_first():  # the others find the decoded images in the cache
        splits = load_data(recipe)
    torch.manual_seed(recipe.seed)
    model: Network | ConvertedSNN
    if start is not None:
        start.form.check(splits)
        form, model = start.form, start.model
    else:
        assert not isinstance(recipe, FinetuneRecipe)
        form = InputFormat.of(splits)
        model = form.build(recipe)
    augment = None if recipe.augmentation == type(recipe.augmentation)() else recipe.augmentation
    events = recipe.events if isinstance(recipe, EventRecipe) else None
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
        mix=EventMix(events.mix) if events is not None and events.mix else None,
        shuffle=True,
        balanced=events is not None and events.balanced,
        seed=recipe.seed,
        drop_last=True,
        **place,
    )
    steps = 1 if isinstance(recipe, AnnRecipe) else recipe.steps
    size = evaluation_batch_size(steps, accelerator.device, image_size=form.image_size)
    if accelerator.num_processes > 1:  # they may differ in threads, and must not in what is a global batch
        from accelerate.utils import broadcast_object_list

        (size,) = broadcast_object_list([size])
    test = Batches(splits.test, size * accelerator.num_processes, **place)
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
        scored_on="held-out" if recipe.hold_out else "test",
    )
    if finished:
        end_processes(accelerator)
        return Result.load(out / RESULTS)
    activity = None
    if not isinstance(recipe, AnnRecipe):
        with autocast(accelerator.device, recipe.execution.precision):
            activity = firing_rates(model, sample(splits.test, form, accelerator.device, recipe.steps), recipe.steps)
    result = _result(recipe, progress, activity, len(train) * recipe.batch_size, accelerator)
    if accelerator.is_main_process:
        card = {"recipe": recipe.to_json(), "input": asdict(form), "result": asdict(result)}
        if start is not None:
            finish(start, out / MODEL, card)
        else:
            save(model, out / MODEL, card)
        result.save(out / RESULTS)
    end_processes(accelerator)
    return result


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
