"""Event recordings: cross-entropy and temporal consistency, LIF and burst neurons, accuracy after each of ten frames.

    python benchmarks/events_table.py nmnist --data FOLDER --out runs/events                    # split of the folder
    python benchmarks/events_table.py nmnist --data FOLDER --folds 5 --out runs/events          # cross-validation
    python benchmarks/events_table.py simulated-fashion-mnist-dvs --data FOLDER_OR_HUB_ID --train-images 10000 \
        --seeds 0 --epochs 4 --out runs/events
    python benchmarks/events_table.py --out runs/events --table

Networks are trained with T = 10 and scored at T = 1 .. 10 by the mean of the first T outputs, last epoch. In
cross-validation all recordings of both splits are cut into folds, each of which is the test set of a network once; its
accuracies are shares of all recordings. Runs that are there already are kept.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from ranvier import provenance
from ranvier.atomic import write_json
from ranvier.data import Batches
from ranvier.data.events import FrameSet, FrameSplits
from ranvier.recipes import EventRecipe, load_data, run
from ranvier.recipes.catalogue import RECIPES
from ranvier.training import fit

ROWS = {
    "LIF, cross-entropy": {"neuron": "lif", "method": "direct"},
    "LIF, ETC": {"neuron": "lif", "method": "etc"},
    "LIFB, cross-entropy": {"neuron": "lifb", "method": "direct"},
    "LIFB, ETC": {"neuron": "lifb", "method": "etc"},
}


def everything(splits: FrameSplits) -> FrameSet:
    """Both splits as one set."""
    parts = [part.read(torch.arange(len(part))) for part in (splits.train, splits.test)]
    labels = torch.cat([splits.train.labels, splits.test.labels])
    return FrameSet(torch.cat(parts), labels, splits.train.classes, "all recordings")


def cross_validate(recipe: EventRecipe, folds: int) -> dict:
    """Hits of each fold's network on that fold, added up."""
    splits = load_data(recipe)
    assert isinstance(splits, FrameSplits)
    whole = everything(splits)
    hits, each, total = torch.zeros(recipe.steps, dtype=torch.long), [], 0
    for number, (train, test) in enumerate(whole.folds(folds, seed=recipe.seed)):
        torch.manual_seed(recipe.seed + number)
        channels, size, _ = whole.shape
        batches = Batches(
            train, recipe.batch_size, augment=recipe.augmentation, shuffle=True, seed=recipe.seed, drop_last=True
        )
        progress = fit(
            recipe.build(whole.num_classes, channels, size),
            recipe.objective,
            batches,
            Batches(test, 500),
            epochs=recipe.epochs,
            steps=None,
            optimization=recipe.optimization,
            execution=recipe.execution,
            quiet=True,
        )
        accuracy = progress.history[-1]["accuracy"]
        each.append(accuracy)
        hits += (torch.tensor(accuracy) * len(test)).round().long()
        total += len(test)
    return {"accuracy": (hits / total).tolist(), "folds": each, "total": total}


def measure(name: str, row: str, seed: int, arguments: argparse.Namespace) -> dict:
    settings = {key: value for key in ("data", "epochs", "train_images", "model") if (value := getattr(arguments, key))}
    recipe = RECIPES[name](**ROWS[row], **settings, seed=seed)
    assert isinstance(recipe, EventRecipe)
    if arguments.folds:
        return cross_validate(recipe, arguments.folds)
    result = run(recipe, folder(name, row, seed, arguments), resume=True, quiet=True)
    return {"accuracy": result.accuracy_by_step, "rate": result.firing_rate, "seconds": result.seconds}


def folder(name: str, row: str, seed: int, arguments: argparse.Namespace) -> Path:
    mark = f"{arguments.folds}-fold" if arguments.folds else "split"
    plain = "".join(c if c.isalnum() else "_" for c in row.lower())
    return arguments.out / f"{name}-{mark}-{plain}-seed{seed}"


def table(out: Path) -> str:
    found: dict[str, dict[str, list[dict]]] = {}
    for path in sorted(out.glob("*.json")):
        content = json.loads(path.read_text())
        found.setdefault(content["what"], {}).setdefault(content["row"], []).append(content)
    lines = []
    for what, rows in found.items():
        shown = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        lines += ["", f"### {what}", "", "| | " + " | ".join(f"T={t + 1}" for t in shown) + " | runs |"]
        lines.append("|---" * (len(shown) + 2) + "|")
        for row in ROWS:
            if row in rows:
                cells = [spread([100 * one["accuracy"][t] for one in rows[row]]) for t in shown]
                lines.append(f"| {row} | {' | '.join(cells)} | {len(rows[row])} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if values[1:] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", choices=[name for name in RECIPES if "dvs" in name or name[0] == "n"])
    parser.add_argument("--data", default=None)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--train-images", type=int, default=None)
    parser.add_argument("--model", default=None)
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2, 3, 4))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.out))
        return
    for seed in arguments.seeds:
        for row in arguments.rows:
            path = folder(arguments.recipe, row, seed, arguments).with_suffix(".json")
            if path.exists():
                continue
            torch._dynamo.reset()
            found = measure(arguments.recipe, row, seed, arguments)
            how = f", {arguments.folds}-fold cross-validation" if arguments.folds else ""
            facts = {"device": provenance.device_name("cpu"), "versions": provenance.versions()}
            facts |= {"commit": provenance.commit(), "settings": {k: str(v) for k, v in vars(arguments).items()}}
            write_json(path, {"what": arguments.recipe + how, "row": row, "seed": seed, **found, **facts})
            curve = " ".join(f"{100 * value:.1f}" for value in found["accuracy"])
            print(f"{arguments.recipe}{how}, {row}, seed {seed}: {curve}", flush=True)


if __name__ == "__main__":
    main()
