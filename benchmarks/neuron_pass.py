"""Seconds of a LIF layer, forward and backward, against its peers and against a copy of its input, in one run.

    pip install --no-deps -r benchmarks/requirements.txt
    python benchmarks/neuron_pass.py
    python benchmarks/neuron_pass.py --device cuda
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/neuron_pass.py          # a CPU with huge pages
    python benchmarks/neuron_pass.py --size 2 4 8 8 --steps 3 --rounds 7            # a rehearsal

Input `[T, B, C, H, W]` float32, tau 2, threshold 1, reset not differentiated, gradient with respect to the input for a
dense random upstream gradient. Before anything is timed, spikes and gradients of all contenders are compared with those
of the reference; if one disagrees, nothing is timed. All contenders take turns in every round, so that a machine that
slows down slows all. Stated are medians over the rounds, their range, and medians of the ratios round by round.

Two of our other neurons, PLIF and LIFB, and norse's box neuron take part in time only: they compute something else
(norse has none of these surrogates, and differentiates its reset).

Extra memory is what a pass adds at its peak: to the resident memory of a process of its own (Linux; glibc is told there
to return freed memory at once), or to what torch has allocated on a GPU.

The physical yardstick is the copy, which reads and writes the input once. A neuron pass that keeps only its input reads
it twice, reads the upstream gradient once, and writes spikes and gradient: 2.5 copies.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peak_memory import RETURNS_MEMORY, extra_bytes, in_a_process_of_its_own
from torch import Tensor

from ranvier import kernels, provenance
from ranvier.atomic import write_json
from ranvier.dynamics import ATan, LIFBParams, LIFParams, PLIFParams, Triangle

Pass = Callable[[Tensor], Tensor]
"""Spikes `[T, B, ...]` for an input that has a gradient."""

SURROGATES = {"atan": ATan(2.0), "triangle": Triangle(0.5)}
OURS = "ranvier, auto"
COPY = "copy of the input"

SPIKES_MAY_DIFFER = 1e-5
"""Share of spikes: peers add and multiply in another order, and a potential within rounding of the threshold flips."""

GRADIENTS_MAY_DIFFER = 1e-2
"""Relative distance (L2): a flipped spike moves the gradients of its neuron."""


class MissingError(Exception):
    """Why a contender cannot take part here."""


class PlainSpike(torch.autograd.Function):
    """What a user writes who needs no library."""

    @staticmethod
    def forward(u: Tensor, surrogate: str) -> Tensor:
        return (u >= 0).to(u.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.surrogate = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * slope(ctx.saved_tensors[0], ctx.surrogate), None


def slope(u: Tensor, surrogate: str) -> Tensor:
    if surrogate == "atan":
        return 1 / (1 + (torch.pi * u).square())
    return (2 - 4 * u.abs()).clamp(min=0)


def plain_loop(x: Tensor, reset: str, surrogate: str) -> Tensor:
    v = torch.zeros_like(x[0])
    spikes = []
    for current in x.unbind(0):
        h = v + (current - v) / 2
        s = PlainSpike.apply(h - 1, surrogate)
        v = h * (1 - s.detach()) if reset == "hard" else h - s.detach()
        spikes.append(s)
    return torch.stack(spikes)


def ranvier(implementation: str) -> Callable[[str, str, torch.device], Pass]:
    def build(reset: Any, surrogate: str, device: torch.device) -> Pass:
        params = LIFParams(v_threshold=1.0, reset=reset, surrogate=SURROGATES[surrogate])
        try:
            kernels.choose(implementation, device, 2**31)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise MissingError(str(error)) from None
        return lambda x: kernels.lif_scan(x, None, params, implementation=implementation)[0]

    return build


def other_neuron(name: str) -> Callable[[str, str, torch.device], Pass]:
    def build(reset: Any, surrogate: str, device: torch.device) -> Pass:
        numbers = {"v_threshold": 1.0, "reset": reset, "surrogate": SURROGATES[surrogate]}
        if name == "plif":
            decay = torch.zeros((), device=device, requires_grad=True)
            return lambda x: kernels.plif_scan(x, None, PLIFParams(**numbers), decay)[0]
        strengths: dict[int, Tensor] = {}

        def lifb(x: Tensor) -> Tensor:
            strength = strengths.setdefault(x.shape[2], torch.ones(x.shape[2], device=device, requires_grad=True))
            return kernels.lifb_scan(x, None, LIFBParams(**numbers), strength)[0]

        return lifb

    return build


def norse(reset: str, surrogate: str, device: torch.device) -> Pass:
    try:
        from norse.torch import LIFBoxCell, LIFBoxParameters, Lift
    except ImportError as error:
        raise MissingError(f"{error}: pip install --no-deps -r benchmarks/requirements.txt") from None
    if reset == "soft":
        raise MissingError("it has a hard reset only")
    box = LIFBoxParameters(tau_mem_inv=torch.tensor(500.0), v_th=torch.tensor(1.0), method="super")  # dt = 1 ms
    layer = Lift(LIFBoxCell(p=box)).to(device)
    return lambda x: layer(x)[0]


def unbind_loop(compiled: bool) -> Callable[[str, str, torch.device], Pass]:
    def build(reset: str, surrogate: str, device: torch.device) -> Pass:
        run = torch.compile(plain_loop, fullgraph=True) if compiled else plain_loop
        return lambda x: run(x, reset, surrogate)

    return build


def spikingjelly(compiled: bool) -> Callable[[str, str, torch.device], Pass]:
    def build(reset: str, surrogate: str, device: torch.device) -> Pass:
        try:
            from spikingjelly.activation_based import functional, neuron
            from spikingjelly.activation_based import surrogate as surrogates
        except ImportError as error:
            raise MissingError(f"{error}: pip install --no-deps -r benchmarks/requirements.txt") from None
        slopes = {"atan": surrogates.ATan(alpha=2.0), "triangle": surrogates.PiecewiseQuadratic(alpha=2.0)}
        node = neuron.LIFNode(
            tau=2.0,
            v_threshold=1.0,
            v_reset=0.0 if reset == "hard" else None,
            surrogate_function=slopes[surrogate],
            detach_reset=True,
            step_mode="m",
        ).to(device)
        run = torch.compile(node) if compiled else node

        def spikes(x: Tensor) -> Tensor:
            functional.reset_net(node)
            return run(x)

        return spikes

    return build


def snntorch(unbound: bool) -> Callable[[str, str, torch.device], Pass]:
    def build(reset: str, surrogate: str, device: torch.device) -> Pass:
        try:
            import snntorch as snn
        except ImportError as error:
            raise MissingError(f"{error}: pip install --no-deps -r benchmarks/requirements.txt") from None
        if reset == "soft":
            raise MissingError("with a leak its soft reset is another one: it subtracts the threshold after the leak")
        slopes = {
            "atan": snn.surrogate.atan(alpha=2.0),
            "triangle": snn.surrogate.custom_surrogate(lambda u, grad, _: grad * slope(u, "triangle")),
        }
        leaky = snn.Leaky(
            beta=0.5,
            threshold=1.0,
            spike_grad=slopes[surrogate],
            reset_mechanism="zero",
            reset_delay=True,  # the reset is then not differentiated; for a reset to zero the spikes are the same
        ).to(device)

        def spikes(x: Tensor) -> Tensor:
            state, sent = leaky.reset_mem(), []
            for current in x.unbind(0) if unbound else (x[t] for t in range(len(x))):
                s, state = leaky(current, state)
                sent.append(s)
            return torch.stack(sent)

        return spikes

    return build


CONTENDERS = {
    OURS: ranvier("auto"),
    "ranvier, compiled": ranvier("compiled"),
    "ranvier, reference": ranvier("reference"),
    "loop over unbind, torch.compile": unbind_loop(True),
    "loop over unbind": unbind_loop(False),
    "SpikingJelly, torch.compile": spikingjelly(True),
    "SpikingJelly": spikingjelly(False),
    "snnTorch, loop over unbind": snntorch(True),
    "snnTorch, loop over x[t]": snntorch(False),
    "norse, Lift(LIFBoxCell)": norse,
    "ranvier, PLIF": other_neuron("plif"),
    "ranvier, LIFB": other_neuron("lifb"),
}
COMPUTE_SOMETHING_ELSE = ("norse, Lift(LIFBoxCell)", "ranvier, PLIF", "ranvier, LIFB")
SCALES_ITS_INPUT = {name: 1.0 if "snnTorch" not in name else 0.5 for name in CONTENDERS}
"""snnTorch does not scale its input with 1 / tau: it gets a scaled one, and no time is counted for that."""


PASSES = {"cpu": 1, "cuda": 10}
"""How many are timed at once."""

SIZES = {"cpu": (32, 128, 32, 32), "cuda": (256, 128, 32, 32)}
"""Of one step: on a GPU a pass over less takes no longer than launching it."""


class Case:
    """One setting: its input, and who takes part."""

    def __init__(self, steps: int, reset: str, surrogate: str, size: list[int], device: torch.device) -> None:
        self.name = f"T={steps}, {reset} reset, {surrogate}"
        generator = torch.Generator().manual_seed(0)
        x = 2 * torch.randn(steps, *size, generator=generator) + 1
        self.upstream = torch.randn(x.shape, generator=generator).to(device)
        self.inputs = {scale: (scale * x).to(device).requires_grad_() for scale in (1.0, 0.5)}
        self.copy = torch.empty_like(self.inputs[1.0])
        self.device = device
        self.passes: dict[str, Pass] = {}
        self.missing: dict[str, str] = {}
        for name, build in CONTENDERS.items():
            try:
                self.passes[name] = build(reset, surrogate, device)
            except MissingError as error:
                self.missing[name] = str(error)

    def run(self, name: str) -> tuple[Tensor, Tensor]:
        """Spikes and gradient of one contender."""
        x = self.inputs[SCALES_ITS_INPUT[name]]
        spikes = self.passes[name](x)
        (gradient,) = torch.autograd.grad(spikes, x, self.upstream)
        return spikes.detach(), gradient

    def seconds(self, name: str) -> float:
        """What one pass of a contender takes, or the copy; on a GPU of several, so that it need not wait for Python."""
        passes = PASSES[self.device.type]
        self.wait()
        start = time.perf_counter()
        for _ in range(passes):
            if name == COPY:
                self.copy.copy_(self.inputs[1.0].detach())
            else:
                kept = self.run(name)  # the last ones are freed after the clock has stopped
        self.wait()
        elapsed = time.perf_counter() - start
        if name != COPY:
            del kept
        return elapsed / passes

    def extra_bytes(self, name: str) -> int | None:
        """What a pass of a contender adds to the memory in use, at its peak."""
        return extra_bytes(lambda: self.run(name), self.device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def disagreements(self) -> Iterator[str]:
        """Who does not compute what the reference computes."""
        expected, wanted = self.run("ranvier, reference")
        self.rate = expected.mean().item()
        for name in self.passes:
            spikes, gradient = self.run(name)
            if name in COMPUTE_SOMETHING_ELSE:
                continue
            share = (spikes != expected).float().mean().item()
            distance = ((gradient * SCALES_ITS_INPUT[name] - wanted).norm() / wanted.norm()).item()
            if not (share <= SPIKES_MAY_DIFFER and distance <= GRADIENTS_MAY_DIFFER):
                yield f"{self.name}: {name}: {share:.2%} of the spikes differ, gradients by {distance:.1e}"


def child(name: str, steps: int, reset: str, surrogate: str, size: list[int], device: str) -> None:
    case = Case(steps, reset, surrogate, size, torch.device(device))
    case.run(name)
    print(json.dumps(case.extra_bytes(name)))


HEADER = f"| | | rate | median ms | range | / {COPY} | / {OURS} | extra MB |\n|---|---|---|---|---|---|---|---|"


def rows(case: Case, seconds: dict[str, list[float]], extra: dict[str, int | None]) -> Iterator[str]:
    for name, values in seconds.items():
        against = [
            statistics.median(a / b for a, b in zip(values, seconds[other], strict=True)) for other in (COPY, OURS)
        ]
        median, least, most = (1e3 * value for value in (statistics.median(values), min(values), max(values)))
        ratios = " | ".join(f"{ratio:.2f}" for ratio in against)
        memory = "" if extra.get(name) is None else f"{extra[name] / 1e6:.0f}"
        spread = f"{median:.2f} | {least:.2f} to {most:.2f}"
        yield f"| {case.name} | {name} | {case.rate:.2f} | {spread} | {ratios} | {memory} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, nargs="+", default=(4, 16))
    parser.add_argument("--size", type=int, nargs=4, default=None, metavar=("B", "C", "H", "W"))
    parser.add_argument("--resets", nargs="+", choices=("hard", "soft"), default=("hard", "soft"))
    parser.add_argument("--surrogates", nargs="+", choices=tuple(SURROGATES), default=tuple(SURROGATES))
    parser.add_argument("--rounds", type=int, default=9, help="at least 7")
    parser.add_argument("--out", default=None, help="json file")
    parser.add_argument("--child", type=json.loads, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        return child(*arguments.child)
    if arguments.rounds < 7:
        parser.error(f"--rounds is {arguments.rounds}, but a median with its range needs at least 7")
    provenance.check_device(arguments.device)
    device = torch.device(arguments.device)
    arguments.size = list(arguments.size or SIZES[device.type])
    settings = [
        (steps, reset, surrogate, arguments.size, device)
        for steps in arguments.steps
        for reset in arguments.resets
        for surrogate in arguments.surrogates
    ]
    wrong = []
    for setting in settings:  # all of them, before anything is timed
        torch._dynamo.reset()
        wrong += Case(*setting).disagreements()
    if wrong:
        raise SystemExit("Nothing was timed, because contenders do not compute the same:\n" + "\n".join(wrong))
    results: dict[str, dict[str, Any]] = {}
    print(HEADER)
    for setting in settings:
        torch._dynamo.reset()
        case = Case(*setting)
        list(case.disagreements())  # compiles, warms up
        seconds: dict[str, list[float]] = {name: [] for name in (COPY, *case.passes)}
        for measured in [False, *[True] * arguments.rounds]:
            for name, values in seconds.items():
                elapsed = case.seconds(name)
                if measured:
                    values.append(elapsed)
        extra = {
            # Torch counts what a GPU hands out; of a CPU only a process of its own can tell.
            name: case.extra_bytes(name)
            if device.type == "cuda"
            else in_a_process_of_its_own(__file__, [name, *setting[:4], str(setting[4])], **RETURNS_MEMORY)
            for name in case.passes
        }
        print("\n".join(rows(case, seconds, extra)), flush=True)
        results[case.name] = {
            "seconds": seconds,
            "extra_bytes": extra,
            "firing_rate": case.rate,
            "missing": case.missing,
        }
    print()
    for name in CONTENDERS:
        reasons: dict[str, list[str]] = {}
        for setting, result in results.items():
            if name in result["missing"]:
                reasons.setdefault(result["missing"][name], []).append(setting)
        for why, where in reasons.items():
            print(f"missing: {name}{f' ({len(where)} settings)' if len(where) < len(results) else ''}: {why}")
    said = {
        "device": provenance.device_name(device),
        "what auto runs": kernels.explain(device, torch.Size(arguments.size).numel()),
        "input": ["T", *arguments.size],
        "rounds": arguments.rounds,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "commit": provenance.commit(),
        "versions": provenance.versions("triton", "spikingjelly", "snntorch", "norse"),
    }
    for name, value in said.items():
        print(f"{name}: {value}")
    if arguments.out:
        write_json(arguments.out, said | {"results": results})
    return None


if __name__ == "__main__":
    main()
