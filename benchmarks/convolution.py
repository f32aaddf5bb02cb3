"""Milliseconds and errors of our convolutions, on a matrix unit or from events, against torch's.

    python benchmarks/convolution.py
    python benchmarks/convolution.py --threads 2 --shares 0.15 0.4
    python benchmarks/convolution.py --precisions bfloat16 --threads 2 --rounds 15

Forward, and the gradients of weights and of the input, which are spikes: a fifth of the neurons fire, or `--shares`.
Both take turns in every round. Stated are the lowest of all rounds (a kernel has no spread but what disturbs it),
ratios of these and of the medians, and the largest difference from double precision over the largest value. A pass that
`ranvier.kernels.convolution` leaves to torch has one number. Nothing is timed where ours is further off than a few
units in the last place.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ranvier import provenance
from ranvier.kernels import choose_precision
from ranvier.kernels.convolution import Passes, convolve, differentiate, explain_convolutions, passes_of

LAYERS = (  # images, channels, size, filters, stride
    (32, 64, 32, 64, 1),
    (32, 64, 32, 128, 2),
    (32, 128, 16, 128, 1),
    (32, 128, 16, 256, 2),
    (32, 256, 8, 256, 1),
    (32, 256, 8, 512, 2),
    (32, 512, 4, 512, 1),
    (128, 64, 32, 64, 1),
    (128, 256, 8, 256, 1),
    (128, 512, 4, 512, 1),
)
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}


def measured(contenders: list[Callable[[], object]], rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of each, the lowest and the median."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds + 1):  # the first warms up
        for taken, run in zip(seconds, contenders, strict=True):
            begin = time.perf_counter()
            run()
            taken.append(time.perf_counter() - begin)
    return [(1e3 * min(taken[1:]), 1e3 * statistics.median(taken[1:])) for taken in seconds]


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


def measure(
    images: int, channels: int, size: int, filters: int, stride: int, dtype: torch.dtype, share: float, rounds: int
) -> str:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(images, channels, size, size, generator=generator) < share).to(dtype)
    weight = 0.05 * torch.randn(filters, channels, 3, 3, generator=generator)
    weight = weight.to(dtype).float()  # so that nothing is rounded that double precision does not see
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    theirs_weight = weight.to(dtype)
    where = [stride, stride], [1, 1]
    rest = [1, 1], False, [0, 0], 1
    grad = torch.randn_like(torch.conv2d(x, theirs_weight, None, *where))

    def backward(x: Tensor, weight: Tensor, grad: Tensor, needed: list[bool]) -> list[Tensor | None]:
        found = torch.ops.aten.convolution_backward(grad, x, weight, None, *where, *rest, [*needed, False])
        return list(found[:2])

    ways = ([False, True], [True, False])
    torchs = [lambda: torch.conv2d(x, theirs_weight, None, *where)]
    torchs += [lambda needed=needed: backward(x, theirs_weight, grad, needed) for needed in ways]
    ours = [lambda: convolve(x, weight, None, *where, learned=True)]
    ours += [lambda needed=needed: differentiate(grad, x, weight, *where, [*needed, False]) for needed in ways]
    passes = passes_of(x, weight, None, *where, learned=True)
    runs_here = Passes(passes.output, passes.of_weight, passes.of_x)  # in the order of the columns

    def values(runs: list[Callable[[], object]]) -> list[Tensor]:
        return [runs[0](), runs[1]()[1], runs[2]()[0]]

    exact = [torch.conv2d(x.double(), weight.double(), None, *where)]
    exact += backward(x.double(), weight.double(), grad.double(), [True, True])[::-1]
    errors = [[error(got, one) for got, one in zip(values(runs), exact, strict=True)] for runs in (torchs, ours)]
    if max(errors[1]) > LARGEST_ERROR[dtype]:
        raise SystemExit(f"Nothing was timed: ours is {max(errors[1]):.0e} off.")
    taken = measured([*torchs, *ours], rounds)
    theirs = taken[:3]
    mine = [own if here else other for here, own, other in zip(runs_here, taken[3:], theirs, strict=True)]
    pairs = zip(runs_here, theirs, mine, strict=True)
    cells = [f"{a:.1f} / {b:.1f}" if here else f"{a:.1f}" for here, (a, _), (b, _) in pairs]
    ratios = [sum(a) / sum(b) for a, b in zip(zip(*theirs, strict=True), zip(*mine, strict=True), strict=True)]
    told = ["{:.0e}, {:.0e}, {:.0e}".format(*each) for each in errors]
    layer = f"{images}, {channels}, {size}x{size}, {filters} of 3x3" + f", stride {stride}" * (stride > 1)
    return f"| {layer} | {' | '.join(cells)} | {ratios[0]:.1f} | {ratios[1]:.1f} | {' | '.join(told)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shares", type=float, nargs="+", default=(0.2,), help="of neurons that fire")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=("float32", "bfloat16") if choose_precision("auto", "cpu").precision == "bfloat16" else ("float32",),
        help="by default both, or float32 where the processor has no instructions for bfloat16",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"convolutions run on: {explain_convolutions()}")
    for precision, share in itertools.product(arguments.precisions, arguments.shares):
        print(f"\n{precision}, {share:.0%} fire; torch / ours ms where ours runs, threads: {arguments.threads}\n")
        print("| images, channels, size, filters | output | weights | spikes | ratio | of medians | errors | ours |")
        print("|---|---|---|---|---|---|---|---|")
        for layer in LAYERS:
            print(measure(*layer, getattr(torch, precision), share, arguments.rounds), flush=True)
    print(f"\ndevice: {provenance.device_name('cpu')}\nversions: {provenance.versions()}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
