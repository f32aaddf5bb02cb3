"""Accuracy by time step of converted networks: every threshold with every correction, and what `auto` chooses.

    ranvier train-ann cifar10 --data PATH --seed 0 --out runs/ann-0
    python benchmarks/conversion_table.py runs/ann-* --data PATH --out runs/conversion --steps 1 2 4 8 16
    python benchmarks/conversion_table.py --out runs/conversion --keep docs/results/conversion.jsonl
    python benchmarks/conversion_table.py --table docs/results/conversion.jsonl

Each (network, T) is searched once per setting of signed spikes: all candidates are scored on held-out training images,
and for every row the chosen one is then scored on the test images. One json file per (network, T, calibration seed) is
written; those that exist are not computed again, but for the rows of `auto` with `--rows auto`. What was scored before
an interruption is kept in a file beside, `.scored`; the search alone is done again. `--keep` puts the json files into
one, a line each, in place of those scored on fewer test images; `--table` prints Markdown from that file.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from math import nan
from pathlib import Path

import torch

from ranvier import provenance
from ranvier.atomic import replacing, write_json
from ranvier.conversion import Search, Settings, Trial
from ranvier.data import Batches, evaluation_batch_size
from ranvier.evaluation import accuracy_by_step
from ranvier.recipes import load_data, load_trained
from ranvier.training import channels_last, lay_out

BIASES = ("none", "light", "ftbc")


def measure(
    folder: Path, data: str | None, steps: int, seed: int, tested: int, images: int, rows: str, kept: Path
) -> dict:
    trained = load_trained(folder)
    splits = load_data(trained.recipe.override(hold_out=0), data)
    form = trained.form.normalization
    _, chosen = splits.train.hold_out(images, seed=seed)
    calibration = [(channels_last(x), y) for x, y in Batches(chosen, 500, normalization=form)]
    size = evaluation_batch_size(steps)
    test = [(channels_last(x), y) for x, y in Batches(splits.test.first(tested), size, normalization=form)]
    ann = lay_out(trained.model)
    result: dict = {
        "network": folder.name,
        "label": trained.recipe.label,
        "data": trained.recipe.name,
        "steps": steps,
        "calibration_seed": seed,
        "tested": tested,
        "ann": accuracy_by_step(ann, test, 1).final,
        "rows": {},
    }

    # Of an interrupted run, by what was scored: all numbers of a candidate decide what it is.
    scored: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}

    def score(name: str, search: Search, trial: Trial, seconds: float) -> None:
        chosen = str(trial.candidate)
        key = repr((search.signed, tested, images, trial.candidate))
        if key not in scored:
            scored[key] = list(accuracy_by_step(search.rebuild(trial), test, steps).accuracy)
            write_json(kept, scored)
        curve = scored[key]
        result["rows"][name] = {"accuracy": curve, "seconds": seconds, "chosen": chosen}
        print(f"{folder.name} T={steps} {name}: {100 * curve[-1]:.2f} ({chosen}, {seconds:.0f} s)", flush=True)

    for signed in (False, True) if rows in ("all", "few") and steps > 1 else (False,):
        begin = time.perf_counter()
        search = Search(ann, calibration, steps=steps, signed=signed, settings=Settings(seed=seed))
        prepared = time.perf_counter() - begin
        spent: dict[tuple[str, str], float] = {}
        kinds = search.thresholds_to_try("auto")
        for kind in kinds:
            for bias in BIASES:
                begin = time.perf_counter()
                search.try_all((kind,), (bias,))
                spent[kind, bias] = time.perf_counter() - begin
        mark = ", signed" * signed
        for (kind, bias), seconds in spent.items():
            if rows == "auto" or (rows == "few" and (kind != kinds[0] or signed)):
                continue
            own = [
                trial for trial in search.trials if (trial.candidate.threshold, trial.candidate.bias) == (kind, bias)
            ]
            if bias == "ftbc":  # no rounds at all is among the choices of ftbc
                own += [
                    trial
                    for trial in search.trials
                    if (trial.candidate.threshold, trial.candidate.bias) == (kind, "none")
                ]
            best = search.best(own)
            score(f"{kind}, {bias}{mark}", search, best, prepared + seconds)
        best = search.best()
        total = prepared + sum(spent.values())
        score(f"auto, weights kept{mark}", search, best, total)
        begin = time.perf_counter()
        search.try_refit()
        total += time.perf_counter() - begin
        score(f"auto, plain mean{mark}", search, search.best(), total)
        begin = time.perf_counter()
        search.try_leaky()
        total += time.perf_counter() - begin
        score(f"auto{mark}", search, search.best(), total)
    result |= {
        "device": provenance.device_name("cpu"),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }
    return result


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation if there are several."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}" if values else ""


def in_percent(cell: dict, name: str) -> float:
    return 100 * cell["rows"][name]["accuracy"][-1]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keep(folder: Path, kept: Path) -> None:
    """The cells of `folder` and those that `kept` has already, in `kept`."""
    cells = read_lines(kept) if kept.exists() else []
    cells += [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    cells.sort(key=lambda cell: cell["tested"])
    latest = {
        (cell["data"], cell["label"], cell["network"], cell["steps"], cell["calibration_seed"]): cell for cell in cells
    }
    with replacing(kept) as path:
        path.write_text("".join(json.dumps(latest[key]) + "\n" for key in sorted(latest)))


def table(cells: list[dict]) -> None:
    """Markdown: a table for each kind of network, mean and spread over networks; how far `auto` is from the best."""
    kinds: dict = defaultdict(list)
    for cell in cells:
        kinds[f"{cell['label']}, {cell['data']}"].append(cell)
    for kind, cells in kinds.items():
        steps = sorted({cell["steps"] for cell in cells})
        at = {t: [cell for cell in cells if cell["steps"] == t] for t in steps}
        most = max(cell["tested"] for cell in cells)
        anns = {cell["network"]: 100 * cell["ann"] for cell in sorted(cells, key=lambda cell: cell["tested"])}
        print(f"### {kind}\n\nANN {', '.join(f'{ann:.2f}' for ann in anns.values())} % ({len(anns)} trained).\n")
        marks = {t: " \\*" if min(cell["tested"] for cell in at[t]) < most else "" for t in steps}
        print("| | " + " | ".join(f"T={t}{marks[t]}" for t in steps) + " |")
        print("|---|" + "---|" * len(steps))
        names = dict.fromkeys(name for cell in cells for name in cell["rows"])
        for name in sorted(names, key=lambda name: ("signed" in name, name.startswith("auto"))):
            found = ([in_percent(cell, name) for cell in at[t] if name in cell["rows"]] for t in steps)
            print(f"| {name} | " + " | ".join(map(spread, found)) + " |")
        print("| networks | " + " | ".join(str(len(at[t])) for t in steps) + " |")
        for label, ending in (("the slowest ftbc", "ftbc"), ("all that auto tried", "auto")):
            slowest = (
                [
                    max((row["seconds"] for name, row in cell["rows"].items() if name.endswith(ending)), default=nan)
                    for cell in at[t]
                ]
                for t in steps
            )
            print(f"| seconds, {label} | " + " | ".join(f"{statistics.median(each):.0f}" for each in slowest) + " |")
        fewer = {cell["tested"] for cell in cells} - {most}
        print("".join(f"\n\\* First {count:,} test images.\n" for count in fewer))
    gaps = sorted((gap for cells in kinds.values() for cell in cells for gap in gaps_of(cell)), reverse=True)
    print(
        f"`auto` is within 0.5 of its best fixed choice in {sum(gap <= 0.5 for gap, _ in gaps)} of {len(gaps)} cases."
    )
    for gap, where in gaps[:10]:
        print(f"- {gap:.2f} {where}")


def gaps_of(cell: dict) -> list[tuple[float, str]]:
    """By how much the best fixed choice is above `auto`, among binary and among signed spikes."""
    found = []
    for mark in ("", ", signed"):
        fixed = [
            name for name in cell["rows"] if not name.startswith("auto") and name.endswith(", signed") == bool(mark)
        ]
        if f"auto{mark}" in cell["rows"]:
            best = max(fixed, key=lambda name: in_percent(cell, name))
            gap = round(in_percent(cell, best) - in_percent(cell, f"auto{mark}"), 3)
            found.append((gap, f"{cell['network']}, T={cell['steps']}: {best} ({cell['tested']} images)"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=Path, nargs="*", help="folders of `ranvier train-ann`")
    parser.add_argument("--data", default=None)
    parser.add_argument("--steps", type=int, nargs="+", default=(1, 2, 4, 8, 16))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,), help="which calibration images")
    parser.add_argument("--tested", type=int, default=2000, help="first so many test images")
    parser.add_argument("--images", type=int, default=2600, help="calibration images")
    parser.add_argument(
        "--rows",
        choices=("all", "few", "plain", "auto"),
        default="all",
        help="plain: no signed spikes; auto: only what auto chooses, in place of that in an existing file",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/conversion"))
    parser.add_argument("--keep", type=Path, metavar="FILE", help="put what OUT has into this file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print tables of such a file")
    arguments = parser.parse_args()
    with torch.no_grad():
        for steps in arguments.steps:
            for folder in arguments.networks:
                for seed in arguments.seeds:
                    path = arguments.out / f"{folder.name}-T{steps}-{seed}.json"
                    before = json.loads(path.read_text()) if path.exists() else None
                    if before is not None and (arguments.rows != "auto" or before["tested"] != arguments.tested):
                        print(f"{path} is there, with {before['tested']} test images", flush=True)
                        continue
                    kept = path.with_suffix(".scored")
                    cell = measure(
                        folder, arguments.data, steps, seed, arguments.tested, arguments.images, arguments.rows, kept
                    )
                    if before is not None:
                        cell["rows"] = before["rows"] | cell["rows"]
                    write_json(path, cell)
                    kept.unlink(missing_ok=True)
    if arguments.keep:
        keep(arguments.out, arguments.keep)
    if arguments.table:
        table(read_lines(arguments.table))


if __name__ == "__main__":
    main()
