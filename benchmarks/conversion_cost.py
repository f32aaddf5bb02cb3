"""What a conversion costs: seconds against steps and against layers, and ResNet-20 at the default settings.

    python benchmarks/conversion_cost.py --out conversion_cost.json

Layers: plain networks of 3x3 convolutions with 16 channels on 32x32 images, batch normalisation and ReLU. Cost: all
stages of `convert` after tracing, thresholds from the maximum, five rounds of FTBC on batches of 200. The first call
compiles and is not counted. Runs are interleaved, and the median of each is reported, with the straight line through
them and the largest relative distance from it.
"""

import argparse
import statistics

import torch
from torch import nn

from ranvier import provenance
from ranvier.atomic import write_json
from ranvier.conversion import Settings, convert
from ranvier.models import resnet20


def plain(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for index in range(layers):
        parts += [nn.Conv2d(3 if index == 0 else 16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


def seconds(ann: nn.Module, images: torch.Tensor, steps: int, **options: object) -> float:
    snn = convert(ann, images, steps=steps, **options)
    return sum(spent for stage, spent in snn.report.seconds.items() if stage != "trace")


def line(points: dict[int, float]) -> dict[str, float]:
    """Least-squares line through the points, and how far the farthest lies from it."""
    x, y = list(points), list(points.values())
    slope, intercept = statistics.linear_regression(x, y)
    worst = max(abs(intercept + slope * a - b) / b for a, b in points.items())
    return {"seconds_each": slope, "seconds_fixed": intercept, "largest_relative_distance": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=(2, 4, 8, 16))
    parser.add_argument("--layers", type=int, nargs="+", default=(4, 8, 16))
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    images = torch.rand(arguments.images, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    fixed = Settings(rounds=(5,), step_sizes=(0.4,), held_out=0)
    cases = [("steps", steps, 8, steps) for steps in arguments.steps]
    cases += [("layers", layers, layers, 4) for layers in arguments.layers]
    nets = {layers: plain(layers) for layers in {case[2] for case in cases}}
    seconds(nets[8], images, 2, threshold="max", settings=fixed)
    found: dict[str, dict[int, list[float]]] = {"steps": {}, "layers": {}}
    for _ in range(arguments.repeats):
        for what, value, layers, steps in cases:
            spent = seconds(nets[layers], images, steps, threshold="max", settings=fixed)
            found[what].setdefault(value, []).append(spent)
    result: dict = {}
    for what, row in found.items():
        medians = {value: statistics.median(times) for value, times in row.items()}
        result[what] = {"median_seconds": medians, **line(medians)}
        print(what, {value: round(time, 2) for value, time in medians.items()}, line(medians))
    ann = resnet20(10, 3, neuron=lambda _: nn.ReLU()).eval()
    thousand = torch.rand(1000, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    times = [seconds(ann, thousand, 8) for _ in range(2)]
    result["resnet20_default_T8_1000_images"] = times
    print("ResNet-20, T=8, 1000 images, default settings:", [round(time, 1) for time in times], "s")
    result |= {"device": provenance.device_name("cpu"), "versions": provenance.versions()}
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
