"""The first updates of the CIFAR-10 recipe on this machine: does the loss fall, how long does an update take?

python benchmarks/cifar10_first_updates.py --data PATH_OR_HUB_ID --updates 50 --batch-size 32
"""

import argparse
import statistics
import time

import torch

from ranvier import provenance
from ranvier.data import Batches
from ranvier.kernels import compile_whole
from ranvier.recipes import InputFormat, cifar10, load_data


def main() -> None:
    """Print the mean loss of each tenth of the updates and the median time of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10: folder or hub id")
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--neuron", default="lif")
    parser.add_argument("--reference", action="store_true", help="do not compile")
    parser.add_argument("--lr", type=float, default=6.25e-4)
    parser.add_argument("--plain", action="store_true", help="no augmentation: fewer updates show whether it learns")
    arguments = parser.parse_args()
    # The peak learning rate at once: fifty updates of a warm-up of five epochs would hardly move anything.
    recipe = cifar10(data=arguments.data, neuron=arguments.neuron, batch_size=arguments.batch_size, lr=arguments.lr)
    data = load_data(recipe)
    form = InputFormat.of(data)
    torch.manual_seed(0)
    model = form.build(recipe).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = model if arguments.reference else compile_whole(model)
    optimizer = recipe.optimization.build(model)
    batches = Batches(
        data.train,
        recipe.batch_size,
        augment=None if arguments.plain else recipe.augmentation,
        normalization=form.normalization,
        shuffle=True,
        drop_last=True,
    )
    losses, seconds = [], []
    for (images, labels), update in zip(batches.epoch(0), range(arguments.updates), strict=False):
        start = time.perf_counter()
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = recipe.loss(forward, images, labels, recipe.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        if (update + 1) % max(arguments.updates // 10, 1) == 0:
            recent = losses[-max(arguments.updates // 10, 1) :]
            print(f"update {update + 1}: loss {statistics.mean(recent):.3f}", flush=True)
    what = "first" if arguments.reference else "first, with compilation,"
    print(f"{what} update {seconds[0]:.1f} s, then {statistics.median(seconds[1:]):.2f} s each")
    print(f"{provenance.device_name()}, torch {torch.__version__}, ranvier {provenance.commit()}")


if __name__ == "__main__":
    main()
