"""Seconds and memory of a training step of a whole network, against the same network in SpikingJelly and as an ANN.

    pip install --no-deps -r benchmarks/requirements.txt
    python benchmarks/training_step.py                                # steps, all contenders in turn
    python benchmarks/training_step.py --what memory --steps 16       # peak memory, a process for each contender
    python benchmarks/training_step.py --what start                   # the first step of a process, and of a second one
    python benchmarks/training_step.py --what time-steps              # ours at T = 1, 2, 4, 8, 16, 32
    python benchmarks/training_step.py --device cuda --batches 128 512
    python benchmarks/training_step.py --batches 2 --rounds 7 --without "SpikingJelly, torch.compile"    # a rehearsal

Forward, backward and SGD with momentum on random images of 3x32x32, cross-entropy of the mean of all steps. LIF with
tau 2, threshold 0.5, hard reset that is not differentiated, triangle surrogate, batch statistics over all steps. All
run channels-last, in bfloat16 under autocast. SpikingJelly's network has our weights, and in float32 its loss must
equal ours before anything is timed. The ANN has one step of T times the batch and ReLU for the neurons, `rv.nn.ReLU`,
which trains faster than `nn.ReLU` when it is compiled; a second one does without our convolutions, which differ from
those of torch on a matrix unit only. With CUDA graphs, on a GPU alone, ours is compiled and recorded.

In `steps` all contenders take turns in every round. Stated are medians over the rounds, their range, and medians of the
ratios round by round: above 1, ours is faster. Peak memory is what a step adds to the resident memory of a process of
its own, after a step that was not measured; there glibc is told to return freed memory at once.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import spikingjelly_networks
import torch
from peak_memory import RETURNS_MEMORY, extra_bytes, in_a_process_of_its_own
from torch import Tensor, nn

from ranvier import models, provenance
from ranvier.atomic import write_json
from ranvier.kernels import compile_whole
from ranvier.nn import ReLU, pack_spikes, recompute_norms
from ranvier.training import channels_last, lay_out

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "sew_resnet18": partial(models.sew_resnet18, statistics="folded"),
    "vggsnn": partial(models.vggsnn, in_channels=3, image_size=32, statistics="folded"),
}
OURS = "ranvier"
REFERENCE = "ranvier, eager"
GRAPHS = "ranvier, CUDA graphs"
ANN = "ReLU ANN at batch T B, torch.compile"
TORCH_ANN = "the same, convolutions of torch"
CONTENDERS = (
    OURS,
    REFERENCE,
    GRAPHS,
    "ranvier, memory=low",
    "SpikingJelly, torch.compile",
    "SpikingJelly",
    ANN,
    TORCH_ANN,
)


class TorchConv2d(nn.Conv2d):
    """A convolution that is not looked at, and so is always that of torch."""


class Step:
    """A training step of one contender."""

    def __init__(self, contender: str, network: str, batch: int, steps: int, precision: str, device: str) -> None:
        self.device = torch.device(device)
        torch.manual_seed(0)
        ours = NETWORKS[network]()
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(batch, 3, 32, 32, generator=generator)
        self.labels = torch.randint(10, (batch,), generator=generator)
        self.precision = precision
        if contender in (ANN, TORCH_ANN):
            model = NETWORKS[network](neuron=ReLU)
            for layer in model.modules():
                if contender == TORCH_ANN and type(layer) is nn.Conv2d:
                    layer.__class__ = TorchConv2d
            self.images, self.labels = self.images.repeat(steps, 1, 1, 1), self.labels.repeat(steps)
            steps = 1
        elif contender.startswith("SpikingJelly"):
            model = getattr(spikingjelly_networks, network)()
            spikingjelly_networks.copy_weights(ours, model)
        else:
            model = ours
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.model = lay_out(model.to(device)).train()
        if contender == "ranvier, memory=low":
            pack_spikes(model)
            recompute_norms(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.images = channels_last(self.images)
        compiled = contender not in ("SpikingJelly", REFERENCE, "ranvier, memory=low")
        if contender.startswith("SpikingJelly"):
            self.forward = self._spikingjelly(torch.compile(model) if compiled else model, steps)
        elif contender == GRAPHS:
            recorded = torch.compile(model, fullgraph=True, options={"triton.cudagraphs": True})

            def replay() -> Tensor:
                torch.compiler.cudagraph_mark_step_begin()
                return recorded(self.images, steps)

            self.forward = replay
        else:
            run = compile_whole(model) if compiled else model
            self.forward = lambda: run(self.images, steps)

    def _spikingjelly(self, run: Callable[[Tensor], Tensor], steps: int) -> Callable[[], Tensor]:
        from spikingjelly.activation_based import functional

        def forward() -> Tensor:
            functional.reset_net(self.model)
            return run(self.images.expand(steps, *self.images.shape))

        return forward

    def __call__(self) -> float:
        """Train on the batch once; returns the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits = self.forward()
        loss = nn.functional.cross_entropy(logits.float().mean(0), self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def check(network: str, without: list[str]) -> None:
    """Refuse to go on where SpikingJelly's network does not compute what ours does.

    On a CPU, whatever is timed: what libraries for GPUs round differently moves spikes, and the loss by more than this.
    """
    losses = {
        contender: Step(contender, network, 2, 4, "float32", "cpu")()
        for contender in (REFERENCE, "ranvier, memory=low", "SpikingJelly")
        if contender == REFERENCE or contender not in without
    }
    expected = losses[REFERENCE]
    wrong = {name: loss for name, loss in losses.items() if abs(loss - expected) > 1e-3 * expected}
    if wrong:
        raise SystemExit(f"Nothing was timed: {network} has loss {expected:.5f} in ranvier, but {wrong}.")


def time_steps(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()  # reads the loss, and so waits for a GPU
    return time.perf_counter() - begin


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all contenders in turn."""
    results: dict[str, Any] = {}
    print("| | | median ms | range | its time / ours | first step s |\n|---|---|---|---|---|---|")
    for network in arguments.networks:
        check(network, arguments.without)
        for precision in arguments.precisions:
            for batch in arguments.batches:
                name = f"{network}, {precision}, T={arguments.steps}, batch {batch}"
                taking_part = [one for one in CONTENDERS if one not in arguments.without]
                steps = {
                    one: Step(one, network, batch, arguments.steps, precision, arguments.device) for one in taking_part
                }
                first = {one: time_steps(step) for one, step in steps.items()}
                for step in steps.values():
                    step(), step()  # CUDA graphs are recorded in the second
                seconds: dict[str, list[float]] = {one: [] for one in steps}
                for _ in range(arguments.rounds):
                    for one, step in steps.items():
                        seconds[one].append(time_steps(step))
                for one, values in seconds.items():
                    ratio = statistics.median(a / b for a, b in zip(values, seconds[OURS], strict=True))
                    middle, least, most = (1e3 * f(values) for f in (statistics.median, min, max))
                    spread = f"{middle:.0f} | {least:.0f} to {most:.0f}"
                    print(f"| {name} | {one} | {spread} | {ratio:.2f} | {first[one]:.1f} |", flush=True)
                results[name] = {"seconds": seconds, "first": first}
                torch._dynamo.reset()
    return results


def child(given: dict[str, Any]) -> None:
    memory = given.pop("memory")
    step = Step(**given)
    measured = {"first": time_steps(step)}
    if memory:
        step()
        measured["extra"] = float(extra_bytes(step, step.device) or 0)
        measured["seconds"] = statistics.median(time_steps(step) for _ in range(5))
    print(json.dumps(measured))


def each(arguments: argparse.Namespace, memory: bool) -> list[tuple[str, dict[str, Any]]]:
    """What children are given: a name for a row, and the arguments of `Step`."""
    return [
        (
            f"| {network}, {precision}, T={arguments.steps}, batch {batch} | {one} |",
            {
                "contender": one,
                "network": network,
                "batch": batch,
                "steps": arguments.steps,
                "precision": precision,
                "device": arguments.device,
                "memory": memory,
            },
        )
        for network in arguments.networks
        for precision in arguments.precisions
        for batch in arguments.batches
        for one in CONTENDERS
        if one not in arguments.without
    ]


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a step."""
    results = {}
    print("| | | extra MB | ms |\n|---|---|---|---|")
    for name, given in each(arguments, memory=True):
        measured = in_a_process_of_its_own(__file__, given, **RETURNS_MEMORY)
        print(f"{name} {measured['extra'] / 1e6:.0f} | {1e3 * measured['seconds']:.0f} |", flush=True)
        results[name] = measured
    return results


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the first step of a process: with nothing compiled before, and again."""
    results = {}
    print("| | | first step, first start s | first step, second start s |\n|---|---|---|---|")
    for name, given in each(arguments, memory=False):
        with tempfile.TemporaryDirectory() as folder:
            places = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "RANVIER_CACHE": f"{folder}/ranvier"}
            first, second = (in_a_process_of_its_own(__file__, given, **places)["first"] for _ in range(2))
        print(f"{name} {first:.1f} | {second:.1f} |", flush=True)
        results[name] = {"first": first, "second": second}
    return results


def by_time_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours at several T, in turn."""
    results: dict[str, Any] = {}
    counts = (1, 2, 4, 8, 16, 32)
    print("| | T | median ms | per step, / that of T = 4 |\n|---|---|---|---|")
    for network in arguments.networks:
        for precision in arguments.precisions:
            batch = arguments.batches[0]
            steps = {
                count: Step("ranvier, eager", network, batch, count, precision, arguments.device) for count in counts
            }
            for step in steps.values():
                step(), step()
            seconds: dict[int, list[float]] = {count: [] for count in counts}
            for _ in range(arguments.rounds):
                for count, step in steps.items():
                    seconds[count].append(time_steps(step))
            name = f"{network}, {precision}, batch {batch}"
            for count, values in seconds.items():
                share = statistics.median(4 * a / (count * b) for a, b in zip(values, seconds[4], strict=True))
                print(f"| {name} | {count} | {1e3 * statistics.median(values):.0f} | {share:.2f} |", flush=True)
            results[name] = seconds
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("steps", "memory", "start", "time-steps"), default="steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--batches", type=int, nargs="+", default=(8, 32))
    parser.add_argument("--precisions", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16", "float32"))
    parser.add_argument("--steps", type=int, default=4, help="T")
    parser.add_argument("--rounds", type=int, default=7, help="at least 7")
    parser.add_argument("--without", nargs="+", choices=CONTENDERS, default=[], help="contenders that stay out")
    parser.add_argument("--out", default=None, help="json file")
    parser.add_argument("--child", type=json.loads, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        return child(arguments.child)
    if arguments.rounds < 7:
        parser.error(f"--rounds is {arguments.rounds}, but a median with its range needs at least 7")
    provenance.check_device(arguments.device)
    if arguments.device == "cpu":
        arguments.without = [*arguments.without, GRAPHS]
    modes = {"steps": compare, "memory": memory, "start": start, "time-steps": by_time_steps}
    results = modes[arguments.what](arguments)
    said = {
        "device": provenance.device_name(arguments.device),
        "commit": provenance.commit(),
        "versions": provenance.versions("spikingjelly"),
    }
    print()
    for key, value in said.items():
        print(f"{key}: {value}")
    if arguments.out:
        write_json(Path(arguments.out), said | {"what": arguments.what, "results": results})
    return None


if __name__ == "__main__":
    main()
