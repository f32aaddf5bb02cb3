"""Burst networks on their way to hardware: trained a little, decoupled, written to NIR, read back, compared.

    python benchmarks/hardware_round_trip.py --data PATH --out runs/hardware

Trains SEW-ResNet-18 and VGGSNN with burst neurons on the first images of CIFAR-10 for a few hundred updates, leaves
each network in a folder that `ranvier export` and `ranvier energy` take, and compares, on test images, the predictions
of the network, of the decoupled one and of the NIR file, and their spikes.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch

from ranvier import recipes, weights
from ranvier.atomic import write_json
from ranvier.conversion import decouple
from ranvier.data import Batches
from ranvier.export import from_nir, to_nir
from ranvier.recipes import InputFormat, load_data, load_trained
from ranvier.recipes.run import MODEL
from ranvier.training import channels_last, fit, lay_out, start_processes


def train(model: str, data: str, images: int, epochs: int, out: Path) -> None:
    """A network trained on the first `images` of the training set; its card says what it is."""
    recipe = recipes.cifar10(data=data, model=model, neuron="lifb", steps=4, epochs=epochs, batch_size=64, lr=1e-3)
    recipe = recipe.override(warmup_epochs=0, auto_augment=False, cutout=0)
    splits = load_data(recipe)
    form = InputFormat.of(splits)
    torch.manual_seed(recipe.seed)
    network = form.build(recipe)
    batches = Batches(
        splits.train.first(images),
        recipe.batch_size,
        augment=recipe.augmentation,
        shuffle=True,
        seed=recipe.seed,
        drop_last=True,
        normalization=form.normalization,
    )
    test = Batches(splits.test.first(500), 250, normalization=form.normalization)
    progress = fit(
        network,
        recipe.loss,
        batches,
        test,
        epochs=epochs,
        steps=recipe.steps,
        optimization=recipe.optimization,
        execution=recipe.execution,
        out=out,
        run={"recipe": recipe.identity(), "input": asdict(form)},
        accelerator=start_processes(recipe.execution),
    )
    result = {"accuracy_by_step": progress.history[-1]["accuracy"], "trained_on": f"the first {images} images"}
    weights.save(network, out / MODEL, {"recipe": recipe.to_json(), "input": asdict(form), "result": result})


@torch.no_grad()
def compare(folder: Path, data: str, images: int) -> dict:
    """Predictions and logits of the network, of the decoupled one and of the NIR file, on test images."""
    trained = load_trained(folder)
    steps = trained.steps
    splits = load_data(trained.recipe, data)
    batches = Batches(splits.test.first(images), 100, normalization=trained.form.normalization)
    model = lay_out(trained.model)
    first = next(iter(batches))[0]
    receipt = to_nir(model, folder / "model.nir", images=first, steps=steps)
    pair = decouple(model, first, steps=steps)
    read = from_nir(folder / "model.nir")
    same = {"decoupled": 0, "nir": 0}
    largest = {"decoupled": 0.0, "nir": 0.0}
    hits = total = 0
    begin = time.perf_counter()
    for x, labels in batches:
        x = channels_last(x)
        logits = model(x, steps)
        hits += int((logits.mean(0).argmax(1) == labels).sum())
        total += len(labels)
        for name, other in (("decoupled", pair), ("nir", read)):
            found = other(x, steps)
            same[name] += int((found.mean(0).argmax(1) == logits.mean(0).argmax(1)).sum())
            largest[name] = max(largest[name], float((found - logits).abs().max() / logits.abs().max()))
    return {
        "images": total,
        "accuracy": hits / total,
        "same_predictions": same,
        "largest_difference": largest,
        "receipt": asdict(receipt),
        "decoupling": asdict(pair.report),
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["sew-resnet18", "vggsnn"])
    parser.add_argument("--images", type=int, default=6400, help="training images")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tested", type=int, default=1000)
    arguments = parser.parse_args()
    for model in arguments.models:
        folder = arguments.out / model
        if not (folder / MODEL).exists():
            train(model, arguments.data, arguments.images, arguments.epochs, folder)
        found = compare(folder, arguments.data, arguments.tested)
        write_json(folder / "round_trip.json", found)
        print(
            f"{model}: {found['images']} images, accuracy {100 * found['accuracy']:.1f} %; same predictions: "
            f"decoupled {found['same_predictions']['decoupled']}, NIR {found['same_predictions']['nir']}; largest "
            f"difference of logits {found['largest_difference']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
