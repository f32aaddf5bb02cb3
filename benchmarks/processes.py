"""Images per second, losses, weights and bytes of a training with several processes, against one process.

    python benchmarks/processes.py                              # 1 process against 2, on the CPU, in turn
    python benchmarks/processes.py --what bytes                 # bytes per update of large networks
    python benchmarks/processes.py --networks conv4 --data PATH_OR_HUB_ID        # Fashion-MNIST, not made-up images
    python benchmarks/processes.py --networks mlp --rounds 2 --updates 5         # a rehearsal

One process with one thread for each process of the others, one process with one thread, and several processes with one
thread each train the same network on the same global batches, by `ranvier.training.fit`. The images are patterns of ten
classes with noise, made here. Precision is float32 and the network eager. Every training is a fresh start of its
processes, and contenders take turns in every round. The first of two epochs warms up, the second is timed.

Stated are medians over the rounds, their range, and medians of the ratios round by round. Losses and weights are
compared with those of the first contender: the relative difference of the first loss, the largest of all, and the
distance of the weights (L2) over the distance that training moved them. One thread against two shows what another order
of sums does alone: a spike that flips from rounding moves everything after it.

Bytes are those of the buckets that go to the all-reduce of DistributedDataParallel, counted in its communication hook,
and beside them 4 for each parameter that has a gradient. Buffers (running averages) are sent by the main process to the
others before every forward pass. The loopback column is what the machine's loopback device carried in the timed epoch,
per update: for all programs on it, so an upper bound, and only on Linux.

The processes are started by `accelerate launch --multi_gpu`, which starts as many as it is told, also without a GPU.
`accelerate launch --cpu` starts one, whatever `--num_processes` says, unless it is given MPI.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from ranvier import models, provenance
from ranvier.atomic import write_json
from ranvier.data import Batches, ImageSet, Normalization
from ranvier.recipes import fashion_mnist, load_data
from ranvier.training import DirectLoss, Execution, Optimization, end_processes, fit, start_processes
from ranvier.weights import load_tensors, save_tensors

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "mlp": (partial(models.mlp, [784, 512, 256, 10]), (1, 28, 28)),
    "conv4": (models.conv4, (1, 28, 28)),
    "vggsnn": (partial(models.vggsnn, in_channels=2, image_size=48), (2, 48, 48)),
    "sew_resnet18": (models.sew_resnet18, (3, 32, 32)),
    "resnet19": (models.resnet19, (3, 32, 32)),
}
"""What builds a network, and the shape of its images. The mlp has no batch normalisation, the others have."""

TIMED = ("mlp", "conv4")
LARGE = ("resnet19", "sew_resnet18", "vggsnn")


class Recorded:
    """A loss that keeps its values."""

    def __init__(self, loss: DirectLoss) -> None:
        self.loss = loss
        self.values: list[Tensor] = []

    def __call__(
        self, forward: Callable[[Tensor, int | None], Tensor], images: Tensor, labels: Tensor, steps: int | None
    ) -> tuple[Tensor, Tensor]:
        value, logits = self.loss(forward, images, labels, steps)
        self.values.append(value.detach().double())
        return value, logits


def count_and_reduce(updates: list[list[int]], bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook: what DistributedDataParallel does without one, and a note of the size."""
    updates[-1].append(bucket.buffer().nbytes)
    if bucket.is_last():
        updates.append([])
    return allreduce_hook(None, bucket)


def counted(prepare: Callable[[nn.Module], nn.Module], updates: list[list[int]]) -> Callable[[nn.Module], nn.Module]:
    """`prepare_model` of accelerate, with the hook on what it returns."""

    def prepare_and_count(model: nn.Module) -> nn.Module:
        view = prepare(model)
        if isinstance(view, DistributedDataParallel):
            view.register_comm_hook(updates, count_and_reduce)
        return view

    return prepare_and_count


def made_up(shape: tuple[int, int, int], count: int) -> ImageSet:
    """Images of ten classes: a pattern each, half hidden by noise."""
    generator = torch.Generator().manual_seed(0)
    patterns, noise = (torch.randint(256, (n, *shape), generator=generator) for n in (10, count))
    labels = torch.randint(10, (count,), generator=generator)
    images = ((patterns[labels] + noise) // 2).to(torch.uint8)
    return ImageSet(images, labels, tuple("0123456789"), "made-up images")


def real(source: str, count: int) -> ImageSet:
    """The first images of Fashion-MNIST."""
    images = load_data(fashion_mnist(data=source)).train
    assert isinstance(images, ImageSet)
    return ImageSet(images.images[:count], images.labels[:count], images.classes, images.name)


def build(network: str) -> nn.Module:
    """The network as every contender begins with it."""
    torch.manual_seed(0)
    return NETWORKS[network][0]()


def loopback_bytes() -> int | None:
    """What the loopback device has carried so far; None where that is not told."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[0] == "lo:"), None)


class Epochs(Batches):
    """Batches that note what the loopback device has carried when an epoch begins."""

    carried: list[int | None]

    def epoch(self, epoch: int, start: int = 0) -> Any:
        self.carried = [*getattr(self, "carried", []), loopback_bytes()]
        return super().epoch(epoch, start)


def child(given: dict[str, Any]) -> None:
    """Train as one of the processes, and leave what was measured in a folder."""
    torch.set_num_threads(given["threads"])
    execution = Execution(precision="float32", implementation="reference", device="cpu")
    accelerator = start_processes(execution)
    if accelerator.num_processes != given["processes"]:
        raise SystemExit(f"{given['processes']} processes were asked for, but {accelerator.num_processes} came up.")
    updates: list[list[int]] = [[]]
    accelerator.prepare_model = counted(accelerator.prepare_model, updates)
    network, batch = given["network"], given["batch"]
    count = batch * given["updates"]
    images = real(given["data"], count) if given["data"] else made_up(NETWORKS[network][1], count)
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes, "device": accelerator.device}
    place["normalization"] = Normalization(*images.statistics())
    batches = Epochs(images, batch, shuffle=True, drop_last=True, **place)
    few = ImageSet(images.images[:batch], images.labels[:batch], images.classes, images.name)
    test = Epochs(few, batch, **place)
    model = build(network)
    loss = Recorded(DirectLoss("direct"))
    progress = fit(
        model,
        loss,
        batches,
        test,
        epochs=2,
        steps=given["steps"],
        optimization=Optimization("sgd", lr=0.05, warmup_epochs=0.5),
        execution=execution,
        accelerator=accelerator,
        quiet=True,
    )
    losses = accelerator.reduce(torch.stack(loss.values), "mean").tolist()
    before, after = batches.carried[1], test.carried[1]  # the evaluation begins where the timed epoch ends
    if accelerator.is_main_process:
        folder = Path(given["folder"])
        save_tensors(folder / "weights.safetensors", dict(model.named_parameters()), {})
        measured = {
            "images_per_second": count / progress.history[-1]["train_seconds"],
            "losses": losses,
            "buckets": updates[-2] if len(updates) > 1 else [],  # the last update's: the first still sorts them
            "loopback": None if before is None or after is None else (after - before) / given["updates"],
        }
        write_json(folder / "measured.json", measured)
    end_processes(accelerator)


def train(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Start the processes of one contender, and return what they measured."""
    folder.mkdir()
    processes = given["processes"]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", "0"]  # any that is free
    done = subprocess.run(
        [*launcher, __file__, "--child", json.dumps(given | {"folder": str(folder)})],
        env={**os.environ, "OMP_NUM_THREADS": str(given["threads"])},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{given} failed:\n{done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    measured["weights"] = load_tensors(folder / "weights.safetensors")[0]
    return measured


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """L2 distance of all parameters."""
    return sum((one[name] - other[name]).double().square().sum().item() for name in one) ** 0.5


def gradient_bytes(network: str) -> int:
    """4 bytes for each parameter that is trained."""
    return sum(4 * parameter.numel() for parameter in build(network).parameters() if parameter.requires_grad)


def buffer_bytes(network: str) -> int:
    return sum(buffer.nbytes for buffer in build(network).buffers())


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with all contenders in turn."""
    many = arguments.processes
    contenders = {
        f"1 process, {many} threads": (1, many),
        "1 process, 1 thread": (1, 1),
        f"{many} processes, 1 thread each": (many, 1),
    }
    results: dict[str, Any] = {}
    print("| | | images/s | range | / the first's | first loss | losses | weights | loopback MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for network in arguments.networks:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(arguments.rounds):
                for place, (name, (processes, threads)) in enumerate(contenders.items()):
                    given = {
                        "network": network,
                        "processes": processes,
                        "threads": threads,
                        "batch": arguments.batch,
                        "steps": arguments.steps,
                        "updates": arguments.updates,
                        "data": arguments.data,
                    }
                    runs[name].append(train(given, Path(folder) / f"{turn}-{place}"))
        results[network] = report(network, runs)
    return results


def report(network: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print the rows of one network, and return them."""
    first = next(iter(runs.values()))
    moved = distance(first[0]["weights"], dict(build(network).named_parameters()))
    result: dict[str, Any] = {}
    for name, measured in runs.items():
        rates = [run["images_per_second"] for run in measured]
        ratio = statistics.median(
            run["images_per_second"] / other["images_per_second"] for run, other in zip(measured, first, strict=True)
        )
        losses = [abs(a - b) / abs(b) for a, b in zip(measured[0]["losses"], first[0]["losses"], strict=True)]
        weights = distance(measured[0]["weights"], first[0]["weights"]) / moved
        repeats = all(
            run["losses"] == measured[0]["losses"] and distance(run["weights"], measured[0]["weights"]) == 0
            for run in measured
        )
        carried = [run["loopback"] for run in measured if run["loopback"] is not None]
        megabytes = f"{statistics.median(carried) / 1e6:.2f}" if carried else ""
        spread = f"{statistics.median(rates):.0f} | {min(rates):.0f} to {max(rates):.0f} | {ratio:.2f}"
        print(
            f"| {network} | {name} | {spread} | {losses[0]:.1e} | {max(losses):.1e} | {weights:.1e} | {megabytes} |",
            flush=True,
        )
        result[name] = {
            "images_per_second": rates,
            "ratio": ratio,
            "losses": measured[0]["losses"],
            "difference_of_losses": losses,
            "difference_of_weights": weights,
            "repeats_bit_for_bit": repeats,
            "buckets": measured[0]["buckets"],
            "loopback_bytes": carried,
        }
    reduced = result[name]["buckets"]
    print(
        f"{network}: {sum(reduced):,} bytes reduced per update in {len(reduced)} bucket(s), "
        f"{gradient_bytes(network):,} counted; {buffer_bytes(network):,} bytes of buffers. The rounds of "
        + "; ".join(f"{name} {'agree' if one['repeats_bit_for_bit'] else 'differ'}" for name, one in result.items())
        + " bit for bit."
    )
    return result


def measure_bytes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes that large networks reduce per update: counted, and seen in two updates of two processes."""
    results = {}
    print("| | parameters | bytes counted | bytes reduced | buckets | bytes of buffers |\n|---|---|---|---|---|---|")
    for network in arguments.networks:
        given = {"network": network, "processes": 2, "threads": 1, "batch": 4, "steps": 1, "updates": 1, "data": None}
        with tempfile.TemporaryDirectory() as folder:
            buckets = train(given, Path(folder) / "run")["buckets"]
        expected, buffers = gradient_bytes(network), buffer_bytes(network)
        numbers = f"{expected // 4:,} | {expected:,} | {sum(buckets):,} | {len(buckets)} | {buffers:,}"
        print(f"| {network} | {numbers} |", flush=True)
        results[network] = {"counted": expected, "buckets": buckets, "buffers": buffers}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("throughput", "bytes"), default="throughput")
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=None)
    parser.add_argument("--processes", type=int, default=2, help="of the last contender")
    parser.add_argument("--batch", type=int, default=128, help="global batch, a multiple of --processes")
    parser.add_argument("--steps", type=int, default=4, help="T")
    parser.add_argument("--updates", type=int, default=20, help="per epoch; the second of two is timed")
    parser.add_argument("--data", default=None, help="Fashion-MNIST: folder or hub id; only for mlp and conv4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default=None, help="json file")
    parser.add_argument("--child", type=json.loads, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        return child(arguments.child)
    if arguments.processes < 2 or arguments.batch < 1 or arguments.batch % arguments.processes:
        parser.error(
            f"--processes is {arguments.processes} and --batch {arguments.batch}, but they share a batch evenly: "
            "take 2 processes or more, and a multiple of them"
        )
    arguments.networks = arguments.networks or (TIMED if arguments.what == "throughput" else LARGE)
    if arguments.data and not set(arguments.networks) <= set(TIMED):
        parser.error(f"--data is images of 1x28x28, which are for {' and '.join(TIMED)} only")
    results = {"throughput": compare, "bytes": measure_bytes}[arguments.what](arguments)
    said = {
        "device": provenance.device_name().rsplit(",", 1)[0],  # the threads are those of the contenders
        "cores": os.cpu_count(),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
    }
    settings = {key: getattr(arguments, key) for key in ("what", "batch", "steps", "updates", "data", "rounds")}
    print()
    for key, value in (said | settings).items():
        print(f"{key}: {value}")
    if arguments.out:
        write_json(Path(arguments.out), said | settings | {"results": results})
    return None


if __name__ == "__main__":
    main()
