"""The Fashion-MNIST table: neurons x training methods x seeds, on one network and budget.

    python benchmarks/fashion_mnist_table.py --data PATH_OR_HUB_ID --epochs 5 --out runs/table

Runs that are there already are kept, broken ones resume. Prints a markdown table: mean and standard deviation over
seeds of the test accuracy after T = 1 .. 4 steps, last epoch.
"""

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ranvier.recipes import Result

ROWS = {
    "LIF, cross-entropy": ["--neuron", "lif", "--method", "direct"],
    "LIF, ETC": ["--neuron", "lif", "--method", "etc"],
    "LIFB, cross-entropy": ["--neuron", "lifb", "--burst-init", "2", "--method", "direct"],
    "LIFB, ETC": ["--neuron", "lifb", "--burst-init", "2", "--method", "etc"],
    "LIFB (burst_init 1), ETC": ["--neuron", "lifb", "--burst-init", "1", "--method", "etc"],
}


def folder(out: Path, row: str, seed: int) -> Path:
    """Where a run is kept."""
    return out / "-".join(["".join(c if c.isalnum() else "_" for c in row.lower()), f"seed{seed}"])


def train(job: tuple[str, int], arguments: argparse.Namespace) -> None:
    """Run one training in a process of its own."""
    row, seed = job
    place = folder(arguments.out, row, seed)
    if (place / "results.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    recipe = ["fashion-mnist", "--data", arguments.data, "--epochs", str(arguments.epochs), "--seed", str(seed)]
    command = [sys.executable, "-m", "ranvier", "train", *recipe, *ROWS[row], "--resume", "--out", str(place)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    with (place / "log.txt").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    print(f"{row}, seed {seed}: {'done' if done.returncode == 0 else f'failed, see {place}/log.txt'}", flush=True)


def table(out: Path, seeds: list[int]) -> str:
    """Markdown of all runs that are there."""
    lines = [
        "| network | T=1 | T=2 | T=3 | T=4 | spikes per neuron and step | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        paths = [folder(out, row, seed) / "results.json" for seed in seeds]
        results = [Result.load(path) for path in paths if path.exists()]
        if not results:
            continue
        cells = [
            _mean_and_deviation([100 * result.accuracy_by_step[t] for result in results])
            for t in range(len(results[0].accuracy_by_step))
        ]
        rate = statistics.mean(result.firing_rate for result in results)
        lines.append(f"| {row} | {' | '.join(cells)} | {rate:.3f} | {len(results)} |")
    return "\n".join(lines)


def _mean_and_deviation(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Fashion-MNIST: folder or hub id")
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/fashion-mnist-table"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads of each")
    arguments = parser.parse_args()
    jobs = [(row, seed) for seed in arguments.seeds for row in ROWS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda job: train(job, arguments), jobs))
    print(table(arguments.out, arguments.seeds))


if __name__ == "__main__":
    main()
