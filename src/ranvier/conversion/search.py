"""Trying settings of a conversion, and choosing among them on held-out images."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, fx, nn

from ranvier import provenance
from ranvier.checks import check_choice, check_count
from ranvier.conversion.account import Account, Candidate, LayerAccount
from ranvier.conversion.bias import BIASES, VARIANTS, Bias, Variant, channel_means, ftbc, light, potential
from ranvier.conversion.calibration import Calibration, CalibrationImages, check_classes, gather
from ranvier.conversion.progress import Progress
from ranvier.conversion.refit import Refit
from ranvier.conversion.spiking import ConvertedSNN, spiking
from ranvier.conversion.threshold import Activations, Threshold, observe, thresholds
from ranvier.conversion.trace import size_that_is_needed, trace
from ranvier.conversion.vocabulary import SITES
from ranvier.conversion.walk import walk
from ranvier.dynamics import leaky_mean
from ranvier.models import Network
from ranvier.nn import QCFS, ConvertedIF

AUTO_BIASES: tuple[Bias, ...] = ("none", "light", "ftbc")
AUTO_THRESHOLDS: tuple[Threshold, ...] = ("max", "percentile", "mmse")
"""What `auto` tries; `qcfs` in place of `max` where the network has learned ceilings. Fitted weights come on top."""

STANDARD_ERRORS = 2.0
"""Accuracies that differ by no more are taken as equal, and the divergence from the ANN decides."""


@dataclass(frozen=True)
class Settings:
    """The fine print of a conversion."""

    per_channel: bool = True
    """One threshold per channel, or one per layer (max, percentile, mmse, balance)."""
    percentile: float = 99.9
    """Share of activations below the threshold, in percent (percentile)."""
    v_init: float = 0.5
    """Initial potential, in thresholds."""
    mmse_shift: float | None = None
    """Potential that mmse counts on, in thresholds; None for v_init, which neurons start from. Published: 0."""
    variant: Variant = "V1"
    """How neurons go on while FTBC corrects them."""
    rounds: tuple[int, ...] = (0, 1, 2, 3, 5)
    """Numbers of FTBC rounds to choose among; a round corrects every layer once, from one batch."""
    step_sizes: tuple[float, ...] = (0.4, 1.0)
    """FTBC step sizes to choose among: short steps suit thresholds that are good already, long ones deep networks."""
    readout_decays: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
    """Decays of a readout that forgets to choose among, beside one that does not; see `ranvier.dynamics.leaky_mean`."""
    batch_size: int = 200
    """Images per batch; batches to choose on are smaller where that is faster."""
    held_out: float = 0.4
    """Share of the calibration images that settings are chosen on; 0 chooses on those that were fitted on."""
    fit_at_most: int = 600
    """Images that are fitted on. Choosing gains more from many images: whatever is beyond goes there. With `held_out`
    of 0 all are fitted on."""
    first_look: int = 400
    """Images for choosing that all candidates see; those that cannot be told from the best then see all of them."""
    seed: int = 0
    """Decides which images are held out, and the order of the others."""

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        for name in ("batch_size", "fit_at_most", "first_look"):
            check_count(name, getattr(self, name))
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}, but must lie above 0 and at most at 100.")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, but must be a share of the images: at least 0, below 1.")
        if not 0 <= self.v_init <= 1:
            raise ValueError(f"v_init is {self.v_init}, but must lie between 0 and 1 thresholds.")
        for name in ("rounds", "step_sizes", "readout_decays"):
            if not isinstance(getattr(self, name), tuple | list):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but must list what to choose among, as (0, 1, 5)."
                )
        if not self.rounds or any(not isinstance(count, int) or count < 0 for count in self.rounds):
            raise ValueError(
                f"rounds is {self.rounds}, but must list at least one whole number of rounds, none negative."
            )
        sizes = self.step_sizes
        if not sizes or not all(isinstance(size, int | float) and 0 < size < math.inf for size in sizes):
            raise ValueError(f"step_sizes is {sizes}, but must list at least one number, all greater than 0.")
        decays = self.readout_decays
        if not all(isinstance(decay, int | float) and 0 <= decay < 1 for decay in decays):
            raise ValueError(f"readout_decays is {decays}, but must list numbers of at least 0 and below 1.")
        if self.mmse_shift is not None and not 0 <= self.mmse_shift <= 1:
            raise ValueError(f"mmse_shift is {self.mmse_shift}, but must be None or lie between 0 and 1 thresholds.")
        if not isinstance(self.per_channel, bool):
            raise ValueError(f"per_channel is {self.per_channel!r}, but must be True or False.")


@dataclass
class Clock:
    """Adds up seconds by stage: `with clock("biases"): ...`."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block."""
        begin = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin


class Search:
    """Conversions of one ANN to one number of steps, tried one after the other and compared.

    `convert` is a search and its best trial. To look at the others, run it yourself, under `torch.no_grad()`:

        search = Search(ann, images, steps=4)
        search.try_all(("max", "mmse"), ("none", "ftbc"))
        for trial in search.trials:
            print(trial.candidate, search.rebuild(trial)(images, 4).shape)

    Args:
        ann: As in `convert`, like the others.
        calibration: Images, with or without labels.
        steps: T.
        signed: Whether neurons may take spikes back.
        settings: The fine print.
        bar: What to tell what goes on.
    """

    def __init__(
        self,
        ann: nn.Module,
        calibration: Calibration,
        *,
        steps: int,
        signed: bool = False,
        settings: Settings | None = None,
        bar: Progress | None = None,
    ) -> None:
        steps = check_count("steps", steps)
        settings = settings or Settings()
        bar = bar or Progress(wanted=False)
        self.steps = steps
        self.signed = signed
        self.settings = settings
        self.bar = bar
        self.clock = Clock()
        device = next((parameter.device for parameter in ann.parameters()), torch.device("cpu"))
        if any(parameter.dtype == torch.float16 for parameter in ann.parameters()):
            raise TypeError(
                "the ANN has parameters of torch.float16, which cannot hold what calibration counts. Convert it in "
                "single precision, ann.float(), with images of torch.float32; cast the result."
            )
        self.images: CalibrationImages = gather(
            calibration,
            batch_size=settings.batch_size,
            held_out=settings.held_out,
            fit_at_most=settings.fit_at_most,
            seed=settings.seed,
            device=device,
            steps=steps,
            first_look=settings.first_look,
        )
        bar.show("tracing")
        with self.clock("trace"):
            self.ann: fx.GraphModule = trace(ann, self.images.fitting[0][:8])
        network = getattr(ann, "_orig_mod", ann)  # what torch.compile wraps
        self.image_size = (
            network.image_size
            if isinstance(network, Network)
            else size_that_is_needed(self.ann, self.images.fitting[0])
        )
        self.sites = [
            str(node.target)
            for node in self.ann.graph.nodes
            if node.op == "call_module" and isinstance(self.ann.get_submodule(str(node.target)), SITES)
        ]
        bar.show("activations")
        with self.clock("thresholds"):
            self.observed: dict[str, Activations] = observe(self.ann, self.sites, self.images.fitting)
            self.logits = [self.ann(images) for images in self.images.choosing]
        check_classes(self.images, self.logits[0].shape[1])
        joined = torch.cat(self.logits)
        self.spread = (joined - joined.mean(0)).square().mean().clamp_min(1e-12)
        self.answers = self.images.labels or tuple(logits.argmax(1) for logits in self.logits)
        seen = accumulate(map(len, self.images.choosing))
        self.first_batches = next((n for n, count in enumerate(seen, 1) if count >= settings.first_look), None)
        self.found: dict[Threshold, dict[str, Tensor]] = {}
        self.trials: list[Trial] = []

    def thresholds_to_try(self, threshold: Threshold | Literal["auto"]) -> tuple[Threshold, ...]:
        """The asked one, or all that this network can have."""
        if threshold != "auto":
            return (threshold,)
        learned = all(isinstance(self.ann.get_submodule(name), QCFS) for name in self.sites)
        return ("qcfs", *AUTO_THRESHOLDS[1:]) if learned else AUTO_THRESHOLDS

    def biases_to_try(self, bias: Bias | Literal["auto"]) -> tuple[Bias, ...]:
        """The asked one, or all that `auto` tries."""
        return AUTO_BIASES if bias == "auto" else (bias,)

    def passes(self, kinds: Sequence[Threshold], biases: Sequence[Bias], refit: bool, leaky: bool = False) -> int:
        """How often `bar` will be told of something new."""
        rounds = max(self.settings.rounds) * len(self.settings.step_sizes)
        each = sum(rounds if bias == "ftbc" else 1 for bias in biases) + len(self.images.fitting) * refit
        each += leaky and self.steps > 1
        return len(kinds) * each + 1

    def build(self, threshold: Threshold) -> ConvertedSNN:
        """The network with these thresholds and nothing corrected."""
        neurons = {name: ConvertedIF(len(self.observed[name].top), signed=self.signed) for name in self.sites}
        graph, frame_dims = spiking(self.ann, neurons), self.images.fitting[0].ndim
        snn = ConvertedSNN(graph, self.steps, frame_dims, image_size=self.image_size).to(self.logits[0].device)
        for name, neuron in snn.neurons.items():
            found = self.thresholds_of(threshold)[name]
            neuron.threshold.copy_(found)
            neuron.v_init.copy_(self.settings.v_init * found)
        return snn

    def thresholds_of(self, kind: Threshold) -> dict[str, Tensor]:
        """Thresholds of all layers, computed once."""
        settings = self.settings
        if kind not in self.found:
            self.found[kind] = {
                name: thresholds(
                    kind,
                    self.observed[name],
                    self.ann.get_submodule(name),
                    self.steps,
                    name=name,
                    per_channel=settings.per_channel,
                    percentile=settings.percentile,
                    v_init=settings.v_init if settings.mmse_shift is None else settings.mmse_shift,
                )
                for name in self.sites
            }
        return self.found[kind]

    def try_all(self, kinds: Sequence[Threshold], biases: Sequence[Bias]) -> None:
        """Every threshold with every bias."""
        for kind in kinds:
            for bias in biases:
                check_choice("bias", bias, BIASES)
                if bias == "ftbc":
                    self.try_ftbc(kind)
                    continue
                with self.clock("thresholds"):
                    snn = self.build(kind)
                self.bar.show(f"threshold {kind}, bias {bias}")
                with self.clock("biases"):
                    if bias == "light":
                        light(self.ann, snn, self.images.fitting, self.steps)
                    elif bias == "potential":
                        potential(self.ann, snn, self.images.fitting, self.steps)
                self.consider(snn, kind, bias)

    def try_ftbc(self, kind: Threshold) -> None:
        """FTBC after each number of rounds, for each step size; none at all only if that was not tried before."""
        settings = self.settings
        rounds = sorted(set(settings.rounds))
        for step_size in settings.step_sizes:
            with self.clock("thresholds"):
                snn = self.build(kind)
            done = 0
            for goal in rounds:
                if goal == 0 and self._has_uncorrected(kind):
                    continue
                while done < goal:
                    self.bar.show(f"threshold {kind}, ftbc of {step_size:g}, round {done + 1} of {rounds[-1]}")
                    with self.clock("biases"):
                        images = self.images.fitting[done % len(self.images.fitting)]
                        ftbc(self.ann, snn, images, self.steps, step_size=step_size, variant=settings.variant)
                    done += 1
                self.consider(snn, kind, "ftbc", goal, step_size)

    def _has_uncorrected(self, kind: Threshold) -> bool:
        """Whether these thresholds were tried without any correction, as `none` or as no rounds of `ftbc`."""
        candidates = (trial.candidate for trial in self.trials)
        return any(
            one.threshold == kind and one.bias in ("none", "ftbc") and one.rounds == 0 and not one.refit
            for one in candidates
        )

    def try_refit(self) -> None:
        """The best network of each threshold with its weights fitted to the spikes, and FTBC kept up if it has that."""
        for kind in dict.fromkeys(trial.candidate.threshold for trial in self.trials):
            start = self.best([trial for trial in self.trials if trial.candidate.threshold == kind])
            one = start.candidate
            step_size = one.step_size or self.settings.step_sizes[0]
            snn = self.rebuild(start)
            snn.readout_decay = 1.0  # which suits the weights that it was chosen with
            refit = Refit(self.ann, snn, self.steps, step_size if one.bias == "ftbc" else None)
            for number, images in enumerate(self.images.fitting, 1):
                self.bar.show(f"threshold {kind}, fitting weights, batch {number} of {len(self.images.fitting)}")
                with self.clock("weights"):
                    refit.update(images)
            rounds = one.rounds + len(self.images.fitting) * (one.bias == "ftbc")
            self.consider(snn, kind, one.bias, rounds, step_size if one.bias == "ftbc" else 0.0, refit=True)

    def try_leaky(self) -> None:
        """The best network of each threshold with a readout that forgets: all decays are scored on one run of it."""
        if self.steps == 1:
            return  # nothing to forget
        for kind in dict.fromkeys(trial.candidate.threshold for trial in self.trials):
            start = self.best([trial for trial in self.trials if trial.candidate.threshold == kind])
            if start.candidate.readout_decay != 1:
                continue
            self.bar.show(f"threshold {kind}, readouts that forget")
            with self.clock("choosing"):
                logits = list(self.run(self.rebuild(start)))
                for decay in self.settings.readout_decays:
                    errors, hits, far = self.score([leaky_mean(each, decay)[0] for each in logits])
                    candidate = replace(
                        start.candidate,
                        divergence=far,
                        logit_error=errors[-1],
                        accuracy=float(hits.mean()),
                        readout_decay=decay,
                    )
                    self.trials.append(Trial(candidate, errors, hits, start.state))

    def consider(
        self,
        snn: ConvertedSNN,
        threshold: Threshold,
        bias: Bias,
        rounds: int = 0,
        step_size: float = 0.0,
        refit: bool = False,
    ) -> None:
        """Measure a network on the first of the images to choose on, and remember its corrections."""
        with self.clock("choosing"):
            errors, hits, divergence = self.measure(snn, self.first_batches)
        accuracy = float(hits.mean())
        candidate = Candidate(
            threshold, bias, rounds, step_size, refit, divergence, errors[-1], accuracy, snn.readout_decay
        )
        kept = {
            key: tensor.clone()
            for key, tensor in snn.state_dict().items()
            if refit or isinstance(snn.get_submodule(key.rpartition(".")[0]), ConvertedIF)
        }
        self.trials.append(Trial(candidate, errors, hits, kept))

    def measure(self, snn: ConvertedSNN, batches: int | None = None) -> tuple[tuple[float, ...], Tensor, float]:
        """Logit error after 1 .. T steps; which answers were right after T; divergence from the ANN after T.

        Args:
            snn: What to measure.
            batches: How many of the batches to choose on; None for all.
        """
        return self.score(self.run(snn, batches), batches)

    def run(self, snn: ConvertedSNN, batches: int | None = None) -> Iterator[Tensor]:
        """Logits `[T, B, K]`, in float32 at least, of one batch to choose on after the other, or the first so many."""
        for images in self.images.choosing[:batches]:
            logits = snn(images, self.steps)
            yield logits.to(torch.promote_types(logits.dtype, torch.float32))

    def score(self, outputs: Iterable[Tensor], batches: int | None = None) -> tuple[tuple[float, ...], Tensor, float]:
        """What `measure` returns, of logits as `run` gives them."""
        squares = torch.zeros(self.steps, device=self.logits[0].device)
        hits: list[Tensor] = []
        last: list[Tensor] = []
        counts = torch.arange(1, self.steps + 1, device=squares.device).view(-1, 1, 1)
        wanted = self.logits[:batches]
        for output, logits, answers in zip(outputs, wanted, self.answers[:batches], strict=True):
            means = output.cumsum(0) / counts
            squares += (means - logits).square().sum((1, 2))
            index = answers.unsqueeze(1)
            others = means[-1].scatter(1, index, -torch.inf).amax(1)
            hits.append((means[-1].gather(1, index).squeeze(1) > others).float())  # ties, as of silence, are misses
            last.append(means[-1])
        values = sum(logits.numel() for logits in wanted)
        errors = tuple((squares / values / self.spread).tolist())
        return errors, torch.cat(hits), divergence(torch.cat(wanted), torch.cat(last))

    def best(self, trials: Sequence["Trial"] | None = None) -> "Trial":
        """The trial of least divergence among those whose accuracy cannot be told from the best.

        Those that a first look could not tell from the best are measured on all images to choose on before.
        """
        finalists = as_good(self.trials if trials is None else trials)
        return choose([self.complete(trial) for trial in finalists])

    def complete(self, trial: "Trial") -> "Trial":
        """The trial, measured on all images to choose on."""
        if len(trial.hits) == sum(map(len, self.images.choosing)):
            return trial
        one = trial.candidate
        self.bar.note(f"threshold {one.threshold}, bias {one.bias}, {one.rounds} rounds: a longer look")
        with self.clock("choosing"):
            errors, hits, divergence = self.measure(self.rebuild(trial))
        candidate = replace(one, divergence=divergence, logit_error=errors[-1], accuracy=float(hits.mean()))
        whole = Trial(candidate, errors, hits, trial.state)
        self.trials = [whole if other is trial else other for other in self.trials]
        return whole

    def rebuild(self, trial: "Trial") -> ConvertedSNN:
        """The network of a trial."""
        snn = self.build(trial.candidate.threshold)
        snn.readout_decay = trial.candidate.readout_decay
        for key, tensor in trial.state.items():
            path, _, name = key.rpartition(".")
            module = snn.get_submodule(path)
            buffer = name in dict(module.named_buffers(recurse=False))
            own = tensor.clone()  # what is calibrated further must not change the trial
            setattr(module, name, own if buffer else nn.Parameter(own, requires_grad=False))
        return snn

    def finish(self) -> ConvertedSNN:
        """The best network, with its account."""
        best = self.best()
        snn = self.rebuild(best)
        self.bar.show("measuring")
        with self.clock("measuring"):
            before = _Errors(self.ann, self.build(best.candidate.threshold), self.images.choosing, self.steps)
            after = _Errors(self.ann, snn, self.images.choosing, self.steps)
        added = [tensor for neuron in snn.neurons.values() for tensor in neuron.buffers()]
        snn.report = Account(
            steps=self.steps,
            chosen=best.candidate,
            candidates=tuple(trial.candidate for trial in self.trials),
            scored_against="labels" if self.images.labels is not None else "answers of the ANN",
            signed=self.signed,
            fitted_on=self.images.fitted,
            chosen_on=len(best.hits),
            held_out=self.images.held_out > 0,
            logit_error=best.logit_error,
            layers=tuple(after.layer(name, before.errors(name)) for name in self.sites),
            seconds=dict(self.clock.seconds),
            bytes_added=sum(tensor.numel() * tensor.element_size() for tensor in added),
            bytes_currents=after.bytes_per_image * max(map(len, self.images.fitting)),
            versions=provenance.versions(),
            device=provenance.device_name(self.logits[0].device),
        )
        return snn


@dataclass(frozen=True)
class Trial:
    """A combination of settings: how it did, and the tensors to build it again."""

    candidate: Candidate
    logit_error: tuple[float, ...]
    hits: Tensor
    state: dict[str, Tensor]


def as_good(trials: Sequence[Trial]) -> list[Trial]:
    """Those whose accuracy is within two standard errors of the best, on the images that all of them have seen."""
    seen = min(len(trial.hits) for trial in trials)
    hits = [trial.hits[:seen] for trial in trials]
    top = max(range(len(trials)), key=lambda number: (float(hits[number].mean()), -trials[number].candidate.divergence))
    kept = []
    for trial, own in zip(trials, hits, strict=True):
        lead = hits[top] - own  # the same images for both: the spread of the difference counts
        if float(lead.mean()) <= STANDARD_ERRORS * float(lead.std(correction=0)) / seen**0.5:
            kept.append(trial)
    return kept


def choose(trials: Sequence[Trial]) -> Trial:
    """The least divergence among those that are as good as the best."""
    return min(as_good(trials), key=lambda trial: trial.candidate.divergence)


def divergence(logits: Tensor, others: Tensor) -> float:
    """How far other logits are from those of the ANN, as answers [nats].

        min over k of  mean over samples of KL(softmax(logits) || softmax(k others)),   k = 0.1 .. 10

    The difference of logits itself would charge for a common factor and for a common offset, which change no answer:
    networks whose thresholds are low transmit less, and are no worse for it.

    Args:
        logits: Of the ANN, `[B, K]`.
        others: Of another network, `[B, K]`.

    >>> round(divergence(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]])), 4)
    0.0
    """
    wanted = logits.log_softmax(1)
    scales = torch.logspace(-1, 1, 41, dtype=logits.dtype, device=logits.device)
    found = [(wanted.exp() * (wanted - (k * others).log_softmax(1))).sum(1).mean() for k in scales]
    return max(float(torch.stack(found).min()), 0.0)


class _Errors:
    """What every layer transmits on average, next to the activation that it stands for."""

    def __init__(self, ann: fx.GraphModule, snn: ConvertedSNN, batches: tuple[Tensor, ...], steps: int) -> None:
        self.neurons = snn.neurons
        self.sent: dict[str, Tensor] = {}
        self.fired: dict[str, Tensor] = {}
        self.wanted: dict[str, Tensor] = {}
        self.bytes_per_image = 0
        for images in batches:
            share = len(images) / sum(map(len, batches))

            def add(
                name: str, neuron: ConvertedIF, current: Tensor, activation: Tensor, share: float = share
            ) -> Tensor:
                sent: Tensor = neuron(current)
                self._add(self.sent, name, share * channel_means(sent))
                self._add(self.fired, name, share * channel_means((sent != 0).to(sent.dtype)))
                self._add(self.wanted, name, share * channel_means(activation.unsqueeze(0))[0])
                size = current.numel() * current.element_size() // current.shape[1]
                self.bytes_per_image = max(self.bytes_per_image, size)
                return sent

            walk(ann, snn, images, steps, add)

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value

    def errors(self, name: str) -> tuple[float, ...]:
        """Relative mean error of each step."""
        difference = (self.sent[name] - self.wanted[name]).abs().sum(1)
        return tuple((difference / self.wanted[name].sum().clamp_min(1e-12)).tolist())

    def layer(self, name: str, error_before: tuple[float, ...]) -> LayerAccount:
        """The layer's part of the account."""
        fired = self.fired[name]
        threshold = self.neurons[name].threshold
        return LayerAccount(
            name=name,
            channels=len(threshold),
            threshold=float(threshold.mean()),
            error_before=error_before,
            error_after=self.errors(name),
            firing_rate=tuple(fired.mean(1).tolist()),
            dead=float((fired == 0).all(0).float().mean()),
            saturated=float((fired > 1 - 1e-6).all(0).float().mean()),
            infeasible=float((self.wanted[name] > threshold).float().mean()),
        )
