"""How many images per batch are fastest without gradients: time of an image by batch, the same images for all.

    python benchmarks/evaluation_batches.py
    python benchmarks/evaluation_batches.py --networks SEW-ResNet-18 --steps 4 --batches 500 128 32

Networks have random weights; converted ones have thresholds from noise. Batches take turns in every round. `chosen` is
`ranvier.data.evaluation_batch_size`; where it is none of the batches it is measured with them. Stated are medians and
ranges. Nothing is timed where a batch gives other answers than the first. Prepared networks, which split batches
themselves, do not do so here.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ranvier import conversion, models, provenance
from ranvier.data import evaluation_batch_size
from ranvier.export import inference, to_inference
from ranvier.training import channels_last, lay_out

SHAPE = (3, 32, 32)

SAME = 0.9
"""Share of answers that must agree: sums of another order move a spike here and there, and weights are random."""


def _converted(ann: Callable[..., nn.Module]) -> Callable[[int], nn.Module]:
    def build(steps: int) -> nn.Module:
        network = lay_out(ann(neuron=lambda channels: nn.ReLU()).eval())
        return lay_out(conversion.convert(network, torch.rand(64, *SHAPE), steps=steps, threshold="max", bias="none"))

    return build


def _trained(model: Callable[..., nn.Module]) -> Callable[[int], nn.Module]:
    return lambda steps: lay_out(model().eval())


def _prepared(model: Callable[..., nn.Module], precision: str) -> Callable[[int], nn.Module]:
    return lambda steps: to_inference(model().eval(), precision=precision)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "ResNet-20, converted": _converted(models.resnet20),
    "conv4, converted": _converted(partial(models.conv4, in_channels=3, image_size=32)),
    "SEW-ResNet-18": _trained(models.sew_resnet18),
    "SEW-ResNet-18, prepared, bfloat16": _prepared(models.sew_resnet18, "bfloat16"),
    "SEW-ResNet-18, prepared, int8": _prepared(models.sew_resnet18, "int8"),
}


def answers_of(network: nn.Module, images: Tensor, batch: int, steps: int) -> Tensor:
    return torch.cat([network(channels_last(part), steps).mean(0).argmax(1) for part in images.split(batch)])


def seconds_of(network: nn.Module, images: Tensor, batch: int, steps: int) -> float:
    """What all images take."""
    start = time.perf_counter()
    for part in images.split(batch):
        network(channels_last(part), steps)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, nargs="+", default=(1, 4))
    parser.add_argument("--batches", type=int, nargs="+", default=(256, 64, 8))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    inference.evaluation_batch_size = lambda steps, image_size: arguments.images
    torch.manual_seed(0)
    images = torch.rand(arguments.images, *SHAPE)
    print("| ms an image | chosen | " + " | ".join(f"B={batch}" for batch in arguments.batches) + " |")
    print("|---|---|" + "---|" * len(arguments.batches))
    with torch.inference_mode():
        for name in arguments.networks:
            for steps in arguments.steps:
                network = NETWORKS[name](steps)
                chosen = evaluation_batch_size(steps)
                batches = dict.fromkeys((chosen, *arguments.batches))
                answers = [answers_of(network, images, batch, steps) for batch in batches]
                if min(float((one == answers[0]).float().mean()) for one in answers) < SAME:
                    raise SystemExit(f"Nothing was timed: {name} gives other answers at another batch.")
                spent: dict[int, list[float]] = {batch: [] for batch in batches}
                for _ in range(arguments.rounds):
                    for batch in batches:
                        spent[batch].append(1000 * seconds_of(network, images, batch, steps) / len(images))
                cells = [
                    f"{statistics.median(spent[batch]):.2f} ({min(spent[batch]):.2f} to {max(spent[batch]):.2f})"
                    for batch in (chosen, *arguments.batches)
                ]
                cells[0] += f" B={chosen}"
                print(f"| {name}, T={steps} | " + " | ".join(cells) + " |", flush=True)
    print(f"\ndevice: {provenance.device_name('cpu')}")
    print(f"rounds: {arguments.rounds}\nversions: {provenance.versions()}")


if __name__ == "__main__":
    main()
