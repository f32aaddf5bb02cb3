"""Images per second of the Fashion-MNIST recipe: compiled bfloat16 against the float32 reference, in one run.

    python benchmarks/training_throughput.py --data PATH_OR_HUB_ID

Both trainings take turns, a round of updates each, so that a machine that slows down slows both. Stated are medians
over the rounds, their range, and the ratio round by round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from ranvier import provenance
from ranvier.data import Batches
from ranvier.kernels import compile_whole
from ranvier.recipes import InputFormat, Recipe, fashion_mnist, load_data

PATHS = {
    "compiled, bfloat16": {"implementation": "compiled", "precision": "bfloat16"},
    "reference, float32": {"implementation": "reference", "precision": "float32"},
}


def updates(recipe: Recipe, data: object) -> Callable[[int], float]:
    """A function that makes a number of updates and returns the seconds they took."""
    form = InputFormat.of(data)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = form.build(recipe).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = compile_whole(model) if recipe.execution.implementation == "compiled" else model
    optimizer = recipe.optimization.build(model)
    batches = Batches(
        data.train,  # type: ignore[attr-defined]
        recipe.batch_size,
        augment=recipe.augmentation,
        normalization=form.normalization,
        shuffle=True,
        drop_last=True,
    )
    images_of = iter(batches.epoch(0))

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            images, labels = next(images_of)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.execution.precision == "bfloat16"):
                loss, _ = recipe.loss(forward, images, labels, recipe.steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimization.clip_norm or float("inf"))
            optimizer.step()
        return time.perf_counter() - start

    return run


def batch_seconds(recipe: Recipe, data: object, count: int = 100) -> float:
    """Median seconds to prepare one training batch."""
    batches = Batches(
        data.train,  # type: ignore[attr-defined]
        recipe.batch_size,
        augment=recipe.augmentation,
        normalization=InputFormat.of(data).normalization,  # type: ignore[arg-type]
        shuffle=True,
    )
    images_of = iter(batches.epoch(0))
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        next(images_of)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Fashion-MNIST: folder or hub id")
    parser.add_argument("--neuron", default="lif")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=15, help="per round")
    arguments = parser.parse_args()
    recipes = {
        name: fashion_mnist(data=arguments.data, neuron=arguments.neuron, **settings)
        for name, settings in PATHS.items()
    }
    recipe = next(iter(recipes.values()))
    data = load_data(recipe)
    paths = {name: updates(recipe, data) for name, recipe in recipes.items()}
    for run in paths.values():
        run(4)  # compile, warm up
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(arguments.rounds):
        for name, run in paths.items():
            seconds[name].append(run(arguments.updates))
    for name, values in seconds.items():
        rates = sorted(arguments.updates * recipes[name].batch_size / value for value in values)
        print(f"{name}: {statistics.median(rates):.0f} images/s ({rates[0]:.0f} to {rates[-1]:.0f})")
    fast, plain = seconds.values()
    ratios = sorted(b / a for a, b in zip(fast, plain, strict=True))
    print(f"ratio: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), {arguments.rounds} rounds")
    print(f"batches alone (gather, augment, normalise): {1e3 * batch_seconds(recipe, data):.2f} ms each")
    versions = provenance.versions()
    print(f"{provenance.device_name()}, torch {versions['torch']}, ranvier {versions['ranvier']} {provenance.commit()}")


if __name__ == "__main__":
    main()
