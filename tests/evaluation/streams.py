"""Networks that can be streamed, and the rule by which samples stop, in its own words."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranvier import models
from ranvier.conversion import ConvertedSNN, convert
from ranvier.evaluation import run_until_confident
from ranvier.evaluation.streaming import Measure
from ranvier.nn import LIFB, BatchNorm

STEPS, BATCH = 5, 24
MEASURES: tuple[Measure, ...] = ("probability", "margin", "entropy")
every_measure = pytest.mark.parametrize("measure", MEASURES)


class Told(nn.Module):
    """Answers with the logits that it is shown as a constant image, `[B, T, K]`; its state is the number of steps."""

    def forward(
        self, images: Tensor, steps: int, *, state: tuple[int] | None = None, return_state: bool = False
    ) -> Any:
        (start,) = state or (0,)
        logits = images[:, start : start + steps].transpose(0, 1)
        return (logits, (start + steps,)) if return_state else logits


# Two classes, two steps, class 0 is true everywhere; the columns are the lead of class 0 at t = 1 and t = 2.
LEADS = torch.tensor([[3.0, 3.0], [1.0, 1.0], [-2.0, 4.0], [-0.5, 2.5]])
TOLD = torch.stack([LEADS, torch.zeros(4, 2)], -1)  # [B, T, K]
TRUE = torch.zeros(4, dtype=torch.int64)
# All are right after both steps (mean leads 3, 1, 1, 1), the first two after one. Confidence at t = 1 is
# sigmoid |lead|: 0.953, 0.731, 0.881, 0.622, so that as the threshold falls samples 0, 2, 1 and 3 stop early.
FALLING = [1 / (1 + math.exp(-lead)) for lead in (3.0, 2.0, 1.0, 0.5)]


def loader(images: Tensor, labels: Tensor, size: int = 100) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def answer(logits: Tensor, threshold: float, measure: Measure) -> list[tuple[int, list[float]]]:
    """The rule in its own words, one sample at a time: steps and mean of `[T, B, K]`."""
    answers = []
    for sample in logits.double().unbind(1):
        for t in range(1, len(sample) + 1):
            mean = [sum(column) / t for column in zip(*sample[:t].tolist(), strict=True)]
            exponentials = [math.exp(value - max(mean)) for value in mean]
            p = sorted((e / sum(exponentials) for e in exponentials), reverse=True)
            entropy = -sum(q * math.log(q) for q in p if q > 0)
            sure = {"probability": p[0], "margin": p[0] - p[1], "entropy": 1 - entropy / math.log(len(p))}
            if sure[measure] >= threshold or t == len(sample):
                answers.append((t, mean))
                break
    return answers


@torch.no_grad()
def exact(model: nn.Module) -> nn.Module:
    """Parameters that are multiples of 1/8: sums are exact in float32, in whatever order and batch they are taken."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        last = name.startswith(("readout", "head"))  # small, or the first answer is as sure as the last
        parameter.copy_(torch.randint(-5, 6, parameter.shape, generator=generator) / (64 if last else 8))
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eps = 0.0
            module.weight.fill_(0.5)
            module.bias.fill_(0.25)
    return model.eval()


class AnnWithShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        return self.head(torch.flatten(F.relu(self.conv(x)) + x, 1))


def converted(*, signed: bool) -> ConvertedSNN:
    """With a bias for each step, so that its state counts steps."""
    torch.manual_seed(0)
    ann = exact(AnnWithShortcut())
    batches = loader(torch.randint(0, 9, (32, 2, 4, 4)) / 8, torch.zeros(32, dtype=torch.int64))
    snn = convert(ann, batches, steps=STEPS, bias="ftbc", signed=signed)
    for number, neuron in enumerate(snn.neurons.values()):
        neuron.threshold.copy_(neuron.threshold.log2().round().exp2())
        generator = torch.Generator().manual_seed(number)
        neuron.bias = torch.randint(-8, 9, (STEPS, len(neuron.threshold)), generator=generator) / 8
        neuron.v_init.copy_((neuron.v_init * 8).round() / 8)
    return snn


NETWORKS: dict[str, Any] = {
    "lif": lambda: (exact(models.mlp([12, 48, 32, 3])), (12,)),
    "lifb": lambda: (exact(models.conv4(3, 2, image_size=8, neuron=LIFB)), (2, 8, 8)),
    "residual": lambda: (exact(models.resnet20(3, 2)), (2, 4, 4)),
    "converted": lambda: (converted(signed=False), (2, 4, 4)),
    "converted_signed": lambda: (converted(signed=True), (2, 4, 4)),
}


def build(name: str, batch: int = BATCH) -> tuple[nn.Module, Tensor]:
    network, shape = NETWORKS[name]()
    return network, torch.randint(0, 9, (batch, *shape), generator=torch.Generator().manual_seed(2)) / 8


@torch.no_grad()
def medium(network: nn.Module, images: Tensor, measure: Measure = "probability") -> float:
    """A threshold between the confidences of the first step, so that some samples stop there, and some do not."""
    p = run_until_confident(network, images, 1, math.inf).logits.softmax(-1).sort(-1, descending=True).values
    entropy = 1 - torch.special.entr(p).sum(-1) / math.log(p.shape[-1])
    sure = {"probability": p[:, 0], "margin": p[:, 0] - p[:, 1], "entropy": entropy}[measure].unique()
    assert len(sure) > 2, "all samples are equally sure: this test would show nothing"
    return float(sure[len(sure) // 2 - 1 : len(sure) // 2 + 1].mean())


def rule(logits: Tensor, threshold: float, measure: Measure = "probability") -> tuple[Tensor, Tensor]:
    """Steps and mean logits that the rule gives on logits `[T, B, K]` of one call."""
    answers = answer(logits, threshold, measure)
    return torch.tensor([t for t, _ in answers]), torch.tensor([mean for _, mean in answers], dtype=torch.float64)


class NoState(nn.Module):
    def forward(self, images: Tensor, steps: int) -> Tensor:
        return images.transpose(0, 1)[:steps]


class NoStateReturned(nn.Module):
    def forward(self, images: Tensor, steps: int, **_: Any) -> Tensor:
        return images.transpose(0, 1)[:steps]


class Broken(Told):
    """Gives one logit that is no number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: Tensor, steps: int, **arguments: Any) -> Any:
        logits = super().forward(images, steps, **arguments)
        broken = (logits[0] if isinstance(logits, tuple) else logits).clone()
        broken[-1, -1, 1] = self.value
        return (broken, logits[1]) if isinstance(logits, tuple) else broken
