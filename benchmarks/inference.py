"""Milliseconds of SEW-ResNet-18 at inference against its peers, whole calls and streamed steps, in one run.

    pip install --no-deps -r benchmarks/requirements.txt && pip install loguru
    python benchmarks/inference.py --out inference.json
    python benchmarks/inference.py --device cuda
    python benchmarks/inference.py --accuracy RUN --data PATH    # of a trained or converted network
    python benchmarks/inference.py --rounds 2 --batches 2 --image-size 8 --stream-steps 20 \\
        --without-spikingjelly-compiled                                                        # a rehearsal

Constant images `[B, 3, 32, 32]` at T = 1, 2, 4. Ours is `ranvier.export.to_inference`. SpikingJelly gets the same
weights and the images repeated T times, as its users pass them; at bfloat16 its network is cast as a whole, potentials
too. The ANN has a ReLU for each neuron, is prepared in the same way, and runs on T * B images.

Weights, gains and images are numbers of few bits, so that nothing is rounded, in whatever order and at either precision
(potentials of bfloat16 and the ANN apart). Every contender has to give the logits of our plain network, and
SpikingJelly its spikes, neuron by neuron: what runs uncompiled before anything is timed, what is compiled before its
setting is. If one does not, the run stops. Time depends on the values where convolutions read spikes alone (AVX2 in
float32): `--shift` says how many there are. By default a fifth of the neurons fire, in a network as it is initialised
0.16; at 0.5, more than a third.

All contenders take turns in every round, so that a machine that slows down slows all. A turn is one call that is not
measured, then as many as take a tenth of a second, since a contender that finds its weights in the cache is what
a user has. Stated are medians over the rounds, their range, and medians of the ratios round by round.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ranvier import models, provenance
from ranvier.atomic import write_json
from ranvier.evaluation import accuracy_by_step
from ranvier.export import to_inference
from ranvier.kernels import choose_precision
from ranvier.nn import LIF, BatchNorm
from ranvier.recipes import load_trained
from ranvier.training import channels_last

PLAIN = "ranvier, network in eval mode, float32"
STREAM_TURN = 20
"""Streamed steps that a contender makes before the next one's turn; two more before them are not measured."""

TURN_SECONDS = 0.1
"""How long a contender's turn in a round lasts."""

EXACT = 1e-5
"""Largest difference of logits over the largest logit, where nothing is rounded but the readout and the pooling."""

ROUNDED = 2.0**-6
"""The same, where the readout is bfloat16, which has 8 bits."""

ROUNDED_ANN = 0.15
"""The same for the ANN at bfloat16, whose activations are rounded layer after layer."""

SPIKES_MAY_DIFFER = {"float32": 0.0, "bfloat16": 1e-3}
"""Share of SpikingJelly's. At bfloat16 it keeps potentials of 8 bits, which a few steps can use up."""


class MissingError(Exception):
    """Why a contender cannot take part here."""


class Setting(NamedTuple):
    """What a call is given."""

    steps: int
    batch: int
    image_size: int
    device: torch.device
    shift: float

    @property
    def name(self) -> str:
        return f"T={self.steps}, B={self.batch}"


class Contender(NamedTuple):
    """Someone who takes part."""

    logits: Callable[[], Tensor]
    """One call, `[T, B, K]`; for the ANN the T * B answers in this shape."""
    expected: Tensor
    tolerance: float
    stream: Callable[[], Callable[[], Tensor]] | None = None
    """Starts a stream, and returns what makes one step."""
    objection: str = ""
    """What else speaks against it."""


def network(shift: float, neuron: Callable[[int], nn.Module] = LIF) -> models.Network:
    """SEW-ResNet-18 whose arithmetic is exact: four weights of +-1/2 to each neuron, gain 1, a shift of few bits."""
    torch.manual_seed(0)
    model = models.sew_resnet18(neuron=neuron, statistics="folded").eval().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            size = (len(layer.weight), layer.weight[0].numel())
            kept = torch.rand(size).argsort(1).argsort(1) < 4
            signs = torch.where(torch.rand(size) < 0.5, -0.5, 0.5)
            layer.weight.copy_((signs * kept).view_as(layer.weight))
            if layer.bias is not None:
                layer.bias.zero_()
        if isinstance(layer, BatchNorm):
            layer.eps = 0.0
            layer.bias.fill_(shift)
    return model


def images_of(setting: Setting) -> Tensor:
    """Halves in [-2, 2], `[B, C, H, W]`."""
    generator = torch.Generator().manual_seed(1)
    size = (setting.batch, 3, setting.image_size, setting.image_size)
    return (torch.randint(-4, 5, size, generator=generator) / 2).to(setting.device)


def ours(precision: Any, implementation: Any) -> Callable[[Setting], Contender]:
    def build(setting: Setting) -> Contender:
        model, images = network(setting.shift).to(setting.device), images_of(setting)
        try:
            fast = to_inference(model, precision=precision, implementation=implementation)
            if implementation != "compiled":
                fast(images, max(setting.steps, 4))  # decides what reads spikes alone, also for what is streamed
        except (RuntimeError, ValueError) as error:  # what cannot run on this device
            raise MissingError(str(error)) from None
        return Contender(
            lambda: fast(images, setting.steps), model(images, setting.steps), EXACT, lambda: steps_of(fast, images)
        )

    return build


def plain(setting: Setting) -> Contender:
    model, images = network(setting.shift).to(setting.device), images_of(setting)
    return Contender(
        lambda: model(images, setting.steps), model(images, setting.steps), EXACT, lambda: steps_of(model, images)
    )


def steps_of(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A stream of one of our networks."""
    state: Any = None

    def step() -> Tensor:
        nonlocal state
        logits, state = model(images, 1, state=state, return_state=True)
        return logits

    return step


def spikingjelly(precision: str, compiled: bool) -> Callable[[Setting], Contender]:
    def build(setting: Setting) -> Contender:
        try:
            import spikingjelly_networks as peers
        except ImportError as error:
            raise MissingError(str(error)) from None
        model, images = network(setting.shift).to(setting.device), images_of(setting)
        net = peers.sew_resnet18().to(setting.device).eval().requires_grad_(False)
        peers.copy_weights(model, net)
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eps = 0.0
        dtype = getattr(torch, precision)
        net = net.to(dtype)
        x = images.to(dtype).expand(setting.steps, *images.shape).contiguous()
        share = peers.spikes_differ(model, net, x.float(), x)
        limit = SPIKES_MAY_DIFFER[precision]
        objection = f"{share:.2%} of the spikes differ" if not share <= limit else ""
        run = torch.compile(net) if compiled else net

        def logits() -> Tensor:
            peers.functional.reset_net(net)
            return run(x)

        def stream() -> Callable[[], Tensor]:
            peers.functional.reset_net(net)
            return lambda: run(x[:1])

        if compiled:
            try:
                logits()
            except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
                raise MissingError(f"does not compile: {str(error).strip().splitlines()[0]}") from None
        tolerance = EXACT if precision == "float32" else ROUNDED
        return Contender(logits, model(images, setting.steps), tolerance, stream, objection)

    return build


def ann(precision: Any, implementation: Any) -> Callable[[Setting], Contender]:
    def build(setting: Setting) -> Contender:
        model = network(setting.shift, lambda channels: nn.ReLU()).to(setting.device)
        images = images_of(setting).repeat(setting.steps, 1, 1, 1)
        try:
            fast = to_inference(model, precision=precision, implementation=implementation)
            if implementation != "compiled":
                fast(images, max(setting.steps, 4))  # decides what reads spikes alone, also for what is streamed
        except RuntimeError as error:
            raise MissingError(str(error)) from None
        tolerance = EXACT if precision == "float32" else ROUNDED_ANN
        return Contender(lambda: fast(images, 1), model(images, 1), tolerance)

    return build


CONTENDERS: dict[str, Callable[[Setting], Contender]] = {
    "ranvier, bfloat16, auto": ours("bfloat16", "auto"),
    "ranvier, int8, auto": ours("int8", "auto"),
    "ranvier, float32, auto": ours("float32", "auto"),
    "ranvier, bfloat16, compiled": ours("bfloat16", "compiled"),
    "ranvier, float32, compiled": ours("float32", "compiled"),
    PLAIN: plain,
    "SpikingJelly, float32": spikingjelly("float32", compiled=False),
    "SpikingJelly, bfloat16": spikingjelly("bfloat16", compiled=False),
    "SpikingJelly, float32, torch.compile": spikingjelly("float32", compiled=True),
    "SpikingJelly, bfloat16, torch.compile": spikingjelly("bfloat16", compiled=True),
    "ANN at T B images, bfloat16, auto": ann("bfloat16", "auto"),
    "ANN at T B images, float32, auto": ann("float32", "auto"),
    "ANN at T B images, bfloat16, compiled": ann("bfloat16", "compiled"),
    "ANN at T B images, float32, compiled": ann("float32", "compiled"),
}


def seconds_of(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    """What one call takes."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def turn(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Mean of the calls of one turn, but the first."""
    seconds = [seconds_of(call, wait)]
    while len(seconds) < 2 or sum(seconds[1:]) < TURN_SECONDS:
        seconds.append(seconds_of(call, wait))
    return statistics.mean(seconds[1:])


class Case:
    """One setting, and who takes part."""

    def __init__(self, setting: Setting, names: list[str]) -> None:
        self.setting = setting
        self.contenders: dict[str, Contender] = {}
        self.missing: dict[str, str] = {}
        for name in names:
            try:
                self.contenders[name] = CONTENDERS[name](setting)
            except MissingError as error:
                self.missing[name] = str(error)

    def disagreements(self) -> Iterator[str]:
        """Who does not compute what our plain network computes; compiles, where that is still to be done."""
        for name, contender in self.contenders.items():
            difference = (contender.logits().float() - contender.expected).abs().max()
            largest = contender.expected.abs().max()
            if not difference <= contender.tolerance * largest:
                yield f"{self.setting.name}: {name}: logits differ by {float(difference / largest):.1e} of the largest"
            if contender.objection:
                yield f"{self.setting.name}: {name}: {contender.objection}"

    def firing_rate(self) -> float:
        """Share of spikes of all neurons and steps; of graded sums the spikes before they are added."""
        model, sent = network(self.setting.shift).to(self.setting.device), []
        for part in model.modules():
            if isinstance(part, LIF):
                part.register_forward_hook(lambda _, __, spikes: sent.append((spikes.sum(), spikes.numel())))
        model(images_of(self.setting), self.setting.steps)
        return float(sum(total for total, _ in sent)) / sum(count for _, count in sent)

    def wait(self) -> None:
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()

    def rounds(self, count: int) -> dict[str, list[float]]:
        """Seconds of a call, by contender and round."""
        found: dict[str, list[float]] = {name: [] for name in self.contenders}
        for measured in [False, *[True] * count]:
            for name, contender in self.contenders.items():
                elapsed = turn(contender.logits, self.wait)
                if measured:
                    found[name].append(elapsed)
        return found

    def stream(self, steps: int) -> dict[str, list[float]]:
        """Seconds of each streamed step, by contender."""
        found: dict[str, list[float]] = {name: [] for name, who in self.contenders.items() if who.stream}
        for turn in range(1 + -(-steps // STREAM_TURN)):
            for name, values in found.items():
                start = self.contenders[name].stream
                assert start is not None
                step = start()
                elapsed = [seconds_of(step, self.wait) for _ in range(2 + STREAM_TURN)]
                if turn:  # the first one compiles
                    values += elapsed[2:]
        return {name: values[:steps] for name, values in found.items()}


def of_a_run(folder: Path, data: str | None, batches: list[int], rounds: int) -> Iterator[str]:
    """Lines of tables for a trained or converted network: accuracy at each precision, changed answers, and time."""
    trained = load_trained(folder)
    steps = trained.steps
    test = [(channels_last(images), labels) for images, labels in trained.batches(data, steps=steps)]
    built = {
        "float32, in eval mode": trained.model.eval(),
        **{name: to_inference(trained.model, precision=name) for name in ("float32", "bfloat16", "int8")},  # type: ignore[arg-type]
    }
    yield f"| test accuracy % | {' | '.join(f'T={t}' for t in range(1, steps + 1))} | same answers %, T={steps} |"
    yield "|---" * (steps + 2) + "|"
    expected: list[Tensor] = []
    for name, network in built.items():
        curve = accuracy_by_step(network, test, steps)
        answers = [network(images, steps).mean(0).argmax(1) for images, _ in test]
        expected = expected or answers
        same = float(torch.cat([a == b for a, b in zip(answers, expected, strict=True)]).float().mean())
        yield f"| {name} | {' | '.join(f'{100 * value:.2f}' for value in curve.accuracy)} | {100 * same:.2f} |"
    yield f"\n| ms, T={steps} | {' | '.join(f'B={batch}' for batch in batches)} | range |"
    yield "|---" * (len(batches) + 2) + "|"
    times: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in batches} for name in built}
    for batch in batches:
        images = test[0][0][:batch]
        for measured in [False, *[True] * rounds]:
            for name, network in built.items():
                elapsed = turn(lambda network=network, images=images: network(images, steps), lambda: None)  # type: ignore[misc]
                if measured:
                    times[name][batch].append(1e3 * elapsed)
    for name, found in times.items():
        spread = ", ".join(f"{min(values):.2f} to {max(values):.2f}" for values in found.values())
        yield f"| {name} | {' | '.join(f'{statistics.median(values):.2f}' for values in found.values())} | {spread} |"


STREAM_HEADER = "| one streamed step, B=1 | p50 ms | p95 ms |\n|---|---|---|"


def rows(name: str, seconds: dict[str, list[float]], ours: str) -> Iterator[str]:
    for contender, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds[ours], strict=True))
        median, least, most = (1e3 * value for value in (statistics.median(values), min(values), max(values)))
        yield f"| {name} | {contender} | {median:.2f} | {least:.2f} to {most:.2f} | {ratio:.2f} |"


def stream_rows(seconds: dict[str, list[float]]) -> Iterator[str]:
    for contender, values in seconds.items():
        *_, p95 = statistics.quantiles(values, n=20, method="inclusive")
        yield f"| {contender} | {1e3 * statistics.median(values):.2f} | {1e3 * p95:.2f} |"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 32))
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9, help="at least 7, unless it is a rehearsal")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("bfloat16", "float32"),
        default=None,
        help="by default both, or float32 where the device has no instructions for bfloat16",
    )
    parser.add_argument("--shift", type=float, default=0.375, help="of currents, thresholds being 1")
    parser.add_argument("--stream-steps", type=int, default=200)
    parser.add_argument("--without-spikingjelly-compiled", action="store_true", help="compiling it takes minutes")
    parser.add_argument(
        "--accuracy",
        type=Path,
        default=None,
        help="folder of a trained or converted network: scored, and timed by itself",
    )
    parser.add_argument("--data", default=None, help="of that training")
    parser.add_argument("--out", default=None, help="json file")
    arguments = parser.parse_args()
    if arguments.accuracy is not None:
        for line in of_a_run(arguments.accuracy, arguments.data, arguments.batches, arguments.rounds):
            print(line, flush=True)
        print(f"device: {provenance.device_name('cpu')}\nversions: {provenance.versions()}")
        return
    rehearsal = arguments.rounds < 7
    if rehearsal and arguments.out:
        parser.error(f"--rounds is {arguments.rounds}, but a median with its range needs at least 7 to be written")
    provenance.check_device(arguments.device)
    device = torch.device(arguments.device)
    fast = choose_precision("auto", device).precision
    precisions = arguments.precisions or (("bfloat16", "float32") if fast == "bfloat16" else ("float32",))
    reference = f"ranvier, {fast if fast in precisions else precisions[0]}, auto"
    left_out = [
        name
        for name in CONTENDERS
        if (not any(precision in name for precision in (*precisions, "int8")))
        or (arguments.without_spikingjelly_compiled and "SpikingJelly" in name and "torch.compile" in name)
        or (arguments.device == "cuda" and name.endswith(", compiled"))  # there `auto` is that
    ]
    names = [name for name in CONTENDERS if name not in left_out]
    settings = [
        Setting(steps, batch, arguments.image_size, device, arguments.shift)
        for batch in arguments.batches
        for steps in arguments.steps
    ]
    uncompiled = [name for name in names if "compile" not in name]
    wrong = [line for setting in settings for line in Case(setting, uncompiled).disagreements()]
    if wrong:
        raise SystemExit("Nothing was timed, because contenders do not compute the same:\n" + "\n".join(wrong))
    results: dict[str, dict[str, Any]] = {}
    print(f"| | | median ms | range | / {reference} |\n|---|---|---|---|---|")
    for setting in settings:
        torch._dynamo.reset()
        case = Case(setting, names)
        # What is compiled is compiled here, once, and compared before this setting is timed.
        wrong = list(case.disagreements())
        if wrong:
            raise SystemExit("Stopped, because contenders do not compute the same:\n" + "\n".join(wrong))
        seconds = case.rounds(arguments.rounds)
        print("\n".join(rows(setting.name, seconds, reference)), flush=True)
        results[setting.name] = {"seconds": seconds, "firing_rate": case.firing_rate(), "missing": case.missing}
    torch._dynamo.reset()
    stream = Case(Setting(1, 1, arguments.image_size, device, arguments.shift), names).stream(arguments.stream_steps)
    print("\n" + STREAM_HEADER)
    print("\n".join(stream_rows(stream)))
    print()
    for name in left_out:
        print(f"missing: {name}: left out")
    for name, why in {name: why for result in results.values() for name, why in result["missing"].items()}.items():
        print(f"missing: {name}: {why}")
    said = {
        "device": provenance.device_name(device),
        "network": f"sew_resnet18, [B, 3, {arguments.image_size}, {arguments.image_size}]",
        "what auto runs": to_inference(network(arguments.shift).to(device)).choice.reason,
        "firing rate": {name: round(result["firing_rate"], 3) for name, result in results.items()},
        "rounds": f"{arguments.rounds}, a rehearsal" if rehearsal else arguments.rounds,
        "streamed steps": arguments.stream_steps,
        "commit": provenance.commit(),
        "versions": provenance.versions("triton", "spikingjelly"),
    }
    for name, value in said.items():
        print(f"{name}: {value}")
    if arguments.out:
        write_json(arguments.out, said | {"results": results, "stream": stream})


if __name__ == "__main__":
    main()
