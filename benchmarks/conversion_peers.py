"""One trained ReLU network, converted by us and by other libraries: accuracy by time step, seconds, in one run.

    ranvier train-ann cifar10 --activation relu --data PATH --out runs/ann
    pip install --no-deps -r benchmarks/requirements.txt && pip install loguru
    python benchmarks/conversion_peers.py runs/ann --data PATH --steps 1 2 4 8 16
    python benchmarks/conversion_peers.py runs/ann --data PATH --steps 1 2 --tested 100 --images 200    # a rehearsal

Every library gets the same ANN, as a graph of plain PyTorch layers in which normalisation is folded already, and the
same training images to calibrate with. Settings of others are those of their own examples. The answer after T steps is
the largest of the mean output of the first T; SpikingJelly's estimate of a later start of that mean is not used.

Ours are converted for each T. Theirs do not depend on T.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ranvier import provenance
from ranvier.atomic import write_json
from ranvier.conversion import convert
from ranvier.conversion.trace import trace
from ranvier.conversion.vocabulary import Rectifier, reshape_samples
from ranvier.data import Batches
from ranvier.evaluation import accuracy_by_step
from ranvier.recipes import load_data, load_trained
from ranvier.training import channels_last, lay_out

Batch = tuple[Tensor, Tensor]


class Converted(NamedTuple):
    """A spiking network of whatever library."""

    run: Callable[[Tensor, int], Tensor]
    """Images and T to outputs `[T, B, K]`."""
    graded: bool = False
    """Whether a neuron may send several spikes in a step, or take them back."""


class Contender(NamedTuple):
    """A library with its settings."""

    build: Callable[[fx.GraphModule, list[Batch], int], Converted]
    for_each_steps: bool = False
    """Whether it converts for one T."""


LAYERS: dict[Any, Callable[..., nn.Module]] = {
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.max_pool2d: nn.MaxPool2d,
    reshape_samples: lambda sizes: nn.Flatten(),
}
"""Functions of a traced network and the layers that do the same: others know few functions."""


def plain(ann: nn.Module, images: Tensor) -> fx.GraphModule:
    """The ANN in PyTorch's own layers, `nn.ReLU` among them, with normalisation folded."""
    graph = trace(ann, images, move_max_pool=False)
    for name, part in list(graph.named_modules()):
        if isinstance(part, Rectifier):
            assert part.ceiling is None, "others know ReLU only"
            graph.set_submodule(name, nn.ReLU())
    for node in graph.graph.nodes:
        if node.target in LAYERS:
            graph.add_submodule(node.name, LAYERS[node.target](*node.args[1:], **node.kwargs))
            node.op, node.target, node.args, node.kwargs = "call_module", node.name, node.args[:1], {}
    graph.recompile()
    return graph.eval()


def ours(**settings: Any) -> Contender:
    def build(ann: fx.GraphModule, calibration: list[Batch], steps: int) -> Converted:
        snn = convert(ann, calibration, steps=steps, **settings)
        return Converted(snn, settings.get("signed", False))

    return Contender(build, for_each_steps=True)


def spikingjelly(recipe: str, passes: int = 1, **settings: Any) -> Contender:
    def build(ann: fx.GraphModule, calibration: list[Batch], steps: int) -> Converted:
        from spikingjelly.activation_based import ann2snn, functional

        chosen = getattr(ann2snn, recipe)(dataloader=passes * calibration, fuse_flag=True, **settings)
        snn = ann2snn.Converter(recipe=chosen, device="cpu").convert(ann).eval()

        def run(images: Tensor, steps: int) -> Tensor:
            functional.reset_net(snn)
            return torch.stack([snn(images) for _ in range(steps)])

        return Converted(run)

    return Contender(build)


def sinabs() -> Contender:
    def build(ann: fx.GraphModule, calibration: list[Batch], steps: int) -> Converted:
        from sinabs.from_torch import from_model

        snn = from_model(ann, batch_size=1).spiking_model.eval()

        def run(images: Tensor, steps: int) -> Tensor:
            for part in snn.modules():
                if hasattr(part, "reset_states"):
                    part.reset_states()
                if hasattr(part, "batch_size"):
                    part.batch_size = len(images)
            folded = images.repeat_interleave(steps, 0)  # sinabs folds time behind the batch
            return snn(folded).unflatten(0, (len(images), steps)).transpose(0, 1)

        return Converted(run, graded=True)

    return Contender(build)


CONTENDERS = {
    "ranvier, defaults (mmse, ftbc)": ours(),
    "ranvier, auto": ours(threshold="auto", bias="auto"),
    "ranvier, auto, signed": ours(threshold="auto", bias="auto", signed=True),
    "SpikingJelly, RateCodingRecipe, max": spikingjelly("RateCodingRecipe", mode="max"),
    "SpikingJelly, RateCodingRecipe, 99.9%, by channel, half threshold": spikingjelly(
        "RateCodingRecipe", mode="99.9%", channel_wise=True, pre_spike_maxpool=True, half_threshold=True
    ),
    # Its thresholds grow by a share of what exceeds them, batch by batch: one pass over few images leaves them too low.
    "SpikingJelly, LocalThresholdBalancingRecipe, ten passes": spikingjelly("LocalThresholdBalancingRecipe", passes=10),
    "sinabs, from_model": sinabs(),
}


class Network(nn.Module):
    """What `accuracy_by_step` takes."""

    def __init__(self, converted: Converted) -> None:
        super().__init__()
        self.converted = converted

    def forward(self, images: Tensor, steps: int) -> Tensor:
        """Outputs `[T, B, K]`."""
        return self.converted.run(images, steps)


def measure(
    ann: fx.GraphModule, calibration: list[Batch], test: list[Batch], steps: list[int], names: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each contender's accuracy at each T, seconds of converting, and milliseconds of an image at the largest T."""
    total = sum(len(labels) for _, labels in test)
    for name in names:
        contender = CONTENDERS[name]
        found: dict[str, Any] = {"accuracy": {}, "converting": {}}
        converted = None
        for count in steps if contender.for_each_steps else [max(steps)]:
            begin = time.perf_counter()
            converted = contender.build(ann, calibration, count)
            found["converting"][count] = time.perf_counter() - begin
            begin = time.perf_counter()
            curve = accuracy_by_step(Network(converted), test, count)
            found["ms an image"] = 1e3 * (time.perf_counter() - begin) / total
            wanted = [count] if contender.for_each_steps else steps
            found["accuracy"] |= {t: 100 * curve.accuracy[t - 1] for t in wanted}
        assert converted is not None
        yield name, found | {"graded": converted.graded}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, help="folder of `ranvier train-ann ... --activation relu`")
    parser.add_argument("--data", default=None)
    parser.add_argument("--steps", type=int, nargs="+", default=(1, 2, 4, 8, 16))
    parser.add_argument("--tested", type=int, default=2000, help="first so many test images")
    parser.add_argument("--images", type=int, default=2600, help="training images to calibrate with")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), default=tuple(CONTENDERS))
    parser.add_argument("--out", default=None, help="json file")
    arguments = parser.parse_args()
    trained = load_trained(arguments.network)
    splits = load_data(trained.recipe.override(hold_out=0), arguments.data)
    form = trained.form.normalization
    _, chosen = splits.train.hold_out(arguments.images, seed=0)
    calibration = [(channels_last(x), y) for x, y in Batches(chosen, 100, normalization=form)]
    test = [(channels_last(x), y) for x, y in Batches(splits.test.first(arguments.tested), 100, normalization=form)]
    ann = plain(lay_out(trained.model), calibration[0][0][:4])
    own = accuracy_by_step(Network(Converted(lambda images, steps: ann(images).expand(steps, -1, -1))), test, 1).final
    steps = sorted(arguments.steps)
    print(f"{arguments.network.name}: the ANN has {100 * own:.2f} % on the first {arguments.tested} test images\n")
    print("| | " + " | ".join(f"T={t}" for t in steps) + " | converting s | ms an image |")
    print("|---" * (len(steps) + 3) + "|")
    results: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        for name, found in measure(ann, calibration, test, steps, list(arguments.contenders)):
            results[name] = found
            cells = [f"{found['accuracy'][t]:.1f}" for t in steps]
            said = name + ("*" if found["graded"] else "")
            seconds = found["converting"][max(found["converting"])]
            print(f"| {said} | {' | '.join(cells)} | {seconds:.0f} | {found['ms an image']:.1f} |", flush=True)
    said = {
        "device": provenance.device_name("cpu"),
        "commit": provenance.commit(),
        "versions": provenance.versions("spikingjelly", "sinabs"),
    }
    print("\n* a neuron may send more than one spike in a step, or take one back")
    for key, value in said.items():
        print(f"{key}: {value}")
    if arguments.out:
        write_json(arguments.out, said | {"ann": own, "tested": arguments.tested, "results": results})


if __name__ == "__main__":
    main()
