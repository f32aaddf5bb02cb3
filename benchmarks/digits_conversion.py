"""Bias correction on the digits: when it helps, when it hurts, and what choosing on held-out images makes of that.

An MLP 64-128-128-96-64-10 on the bundled digits (1197 to train, 600 to test), five seeds. Thresholds, corrections and
steps as in the independent check that the table is compared with: initial potential half a threshold, analog input and
output. Mean and standard deviation of the test accuracy, and how far the means that neurons send are from those of the
ANN: |E(threshold s_t) - E a| / E a, mean over neurons and steps on the test images.

    python benchmarks/digits_conversion.py --out digits_conversion.json
    python benchmarks/digits_conversion.py --rows fixed    # without those that choose
"""

import argparse
import itertools
import statistics
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ranvier import provenance
from ranvier.atomic import write_json
from ranvier.conversion import ConvertedSNN, Settings, convert
from ranvier.nn import QCFS

STEPS = (1, 2, 4, 8, 16, 32)
WIDTHS = (64, 128, 128, 96, 64, 10)


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels / 16.0, labels, test_size=600, random_state=seed, stratify=labels
    )
    return (
        torch.tensor(train_x, dtype=torch.float32),
        torch.tensor(train_y),
        torch.tensor(test_x, dtype=torch.float32),
        torch.tensor(test_y),
    )


def train(images: Tensor, labels: Tensor, levels: int | None, seed: int, epochs: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(narrow, wide), QCFS(levels=levels) if levels else nn.ReLU()]
    ann = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(ann.parameters(), 1e-3, weight_decay=1e-4)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            noisy = images[index] + 0.05 * torch.randn_like(images[index])
            loss = nn.functional.cross_entropy(ann(noisy), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return ann.eval()


# name: (activation, threshold, per channel, bias, rounds, batch, step size, variant)
ROWS: dict[str, tuple] = {
    "ReLU, layer max, none": ("relu", "max", False, "none", (0,), 128, 0.5, "V1"),
    "ReLU, layer max, light": ("relu", "max", False, "light", (0,), 1197, 0.5, "V1"),
    "ReLU, layer max, V3 3x200 of 0.4": ("relu", "max", False, "ftbc", (3,), 200, 0.4, "V3"),
    "ReLU, layer max, V1 5x128 of 0.5": ("relu", "max", False, "ftbc", (5,), 128, 0.5, "V1"),
    "ReLU, layer max, V1 200x128 of 0.1": ("relu", "max", False, "ftbc", (200,), 128, 0.1, "V1"),
    "QCFS 8, ceiling, none": ("qcfs8", "qcfs", False, "none", (0,), 128, 0.5, "V1"),
    "QCFS 8, ceiling, V1 50x128 of 0.5": ("qcfs8", "qcfs", False, "ftbc", (50,), 128, 0.5, "V1"),
    "QCFS 4, ceiling, none": ("qcfs4", "qcfs", False, "none", (0,), 128, 0.5, "V1"),
    "QCFS 4, ceiling, V1 200x128 of 0.1": ("qcfs4", "qcfs", False, "ftbc", (200,), 128, 0.1, "V1"),
    "ReLU, neuron mmse, none": ("relu", "mmse", True, "none", (0,), 128, 0.5, "V1"),
    "ReLU, neuron mmse, V1 200x128 of 0.1": ("relu", "mmse", True, "ftbc", (200,), 128, 0.1, "V1"),
    "ReLU, layer mmse, none": ("relu", "mmse", False, "none", (0,), 128, 0.5, "V1"),
    "ReLU, layer mmse, V1 200x128 of 0.1": ("relu", "mmse", False, "ftbc", (200,), 128, 0.1, "V1"),
}
CHOICES = (0, 1, 2, 3, 5, 10, 20, 50)
CHOSEN: dict[str, tuple] = {
    "ReLU, layer max, rounds chosen": ("relu", {"threshold": "max", "bias": "ftbc"}, False),
    "ReLU, neuron mmse, rounds chosen": ("relu", {"threshold": "mmse", "bias": "ftbc"}, True),
    "QCFS 8, ceiling, rounds chosen": ("qcfs8", {"threshold": "qcfs", "bias": "ftbc"}, True),
    "ReLU, auto, weights kept": ("relu", {"threshold": "auto", "bias": "auto", "refit": False}, True),
    "QCFS 8, auto, weights kept": ("qcfs8", {"threshold": "auto", "bias": "auto", "refit": False}, True),
    "ReLU, auto, weights kept, no labels": ("relu", {"threshold": "auto", "bias": "auto", "refit": False}, True),
    "ReLU, auto, signed": (
        "relu",
        {"threshold": "auto", "bias": "auto", "signed": True},
        True,
    ),
}


def accuracy(snn: ConvertedSNN, images: Tensor, labels: Tensor, steps: int) -> float:
    with torch.inference_mode():
        return 100 * float((snn(images, steps).mean(0).argmax(1) == labels).double().mean())


def mean_error(snn: ConvertedSNN, ann: nn.Sequential, images: Tensor, steps: int) -> float:
    """How far the means of all neurons are from those of their activations, in parts of these."""
    wanted, sent = [], []
    hooks = [layer.register_forward_hook(lambda *call: wanted.append(call[-1].mean(0))) for layer in ann[1::2]]
    hooks += [
        neuron.register_forward_hook(lambda *call: sent.append(call[-1][0] if type(call[-1]) is tuple else call[-1]))
        for neuron in snn.neurons.values()
    ]
    with torch.inference_mode():
        ann(images), snn(images, steps)
    for hook in hooks:
        hook.remove()
    exact = torch.cat(wanted)
    error = (torch.cat([spikes.mean(1) for spikes in sent], 1) - exact).abs() / exact
    return float(error[:, exact > 0].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--rows", choices=("all", "fixed"), default="all")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    table: dict[str, dict[int, list[float]]] = {}
    errors: dict[str, dict[int, list[float]]] = {}
    for seed in range(arguments.seeds):
        train_x, train_y, test_x, test_y = digits(seed)
        anns = {
            name: train(train_x, train_y, levels, seed, arguments.epochs)
            for name, levels in (("relu", None), ("qcfs8", 8), ("qcfs4", 4))
        }
        for name, ann in anns.items():
            with torch.inference_mode():
                hits = (ann(test_x).argmax(1) == test_y).double().mean()
            table.setdefault(f"{name} ANN", {}).setdefault(0, []).append(100 * float(hits))
        for steps in arguments.steps:
            for name, (ann, threshold, per_channel, bias, rounds, batch, step_size, variant) in ROWS.items():
                settings = Settings(
                    per_channel=per_channel,
                    variant=variant,
                    rounds=rounds,
                    step_sizes=(step_size,),
                    batch_size=batch,
                    held_out=0,
                    mmse_shift=0.0,
                    seed=seed,
                )
                snn = convert(anns[ann], train_x, steps=steps, threshold=threshold, bias=bias, settings=settings)
                table.setdefault(name, {}).setdefault(steps, []).append(accuracy(snn, test_x, test_y, steps))
                error = mean_error(snn, anns[ann], test_x, steps)
                errors.setdefault(name, {}).setdefault(steps, []).append(error)
            for name, (ann, options, per_channel) in (CHOSEN if arguments.rows == "all" else {}).items():
                settings = Settings(
                    per_channel=per_channel, rounds=CHOICES, step_sizes=(0.1, 0.4), seed=seed, mmse_shift=0.0
                )
                calibration = train_x if "no labels" in name else [(train_x, train_y)]
                snn = convert(anns[ann], calibration, steps=steps, settings=settings, **options)
                table.setdefault(name, {}).setdefault(steps, []).append(accuracy(snn, test_x, test_y, steps))
        print(f"seed {seed}, {time.perf_counter() - begin:.0f} s", flush=True)
    for name, row in table.items():
        cells = [
            f"T={t} {statistics.fmean(v):5.1f} ± {statistics.stdev(v) if v[1:] else 0:4.1f}" for t, v in row.items()
        ]
        off = [f"{statistics.fmean(v):.2f}" for t, v in errors.get(name, {}).items() if t in (1, 4)]
        print(f"{name:38}", "  ".join(cells), " error of means", " / ".join(off) or "not measured")
    if arguments.out:
        write_json(
            arguments.out,
            {
                "accuracy": table,
                "error": errors,
                "versions": provenance.versions(),
                "device": provenance.device_name("cpu"),
            },
        )


if __name__ == "__main__":
    main()
