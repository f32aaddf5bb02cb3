"""The one training loop: single process or many, any precision, resumable at any moment."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from ranvier import provenance
from ranvier.atomic import remove_leftovers
from ranvier.checks import check_choice
from ranvier.evaluation import AccuracyByStep, accuracy_by_step, score_by_step
from ranvier.kernels.dispatch import IMPLEMENTATIONS, Implementation, choose, compile_whole
from ranvier.kernels.full_float32 import full_float32
from ranvier.kernels.precision import PRECISIONS, Precision, choose_precision
from ranvier.nn import keep_plainly, pack_spikes, recompute_norms
from ranvier.training.checkpoints import Progress, load_checkpoint, save_checkpoint
from ranvier.training.optimization import Optimization
from ranvier.training.progress import Display, Metrics

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT = "checkpoint.safetensors"
"""Name of the checkpoint in the folder of a run."""


Memory = Literal["default", "low"]
"""What a training keeps for backward."""


class Loss(Protocol):
    """One training method: the loss of a batch, and its logits `[T, B, K]`.

    Labels come as the batches give them: class indices `[B]`, or probabilities `[B, K]` where recordings are mixed.
    """

    def __call__(
        self, forward: Callable[[Tensor, int | None], Tensor], images: Tensor, labels: Tensor, steps: int | None
    ) -> tuple[Tensor, Tensor]:
        """Run the model and score it."""


@runtime_checkable
class EpochHook(Protocol):
    """What a loss may have besides: it is told of every epoch, so that it can freeze a part of the model, say."""

    def begin_epoch(self, model: nn.Module, epoch: int) -> None:
        """Prepare the model, which is in training mode; also called when an epoch is resumed.

        What is done must follow from the epoch, counted from 0, so that a resumed run goes on as it would have.
        """


class EpochBatches(Protocol):
    """Batches that are a pure function of epoch and position: `ranvier.data.Batches`, or your own."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of `epoch` from number `start` on, this process's part of each."""


@dataclass(frozen=True)
class Execution:
    """How a training runs on the machine; none of it is meant to change what is learned."""

    precision: Precision = "auto"
    """Precision of convolutions and linear layers (autocast); potentials, losses and parameters stay in float32.
    auto: bfloat16 where the device has instructions for it, else float32; the card of a run names what it was.
    At float32 a GPU trains convolutions in TF32, as is torch's default, and scores them in float32."""
    implementation: Implementation = "auto"
    """compiled: whole, by torch.compile; reference, native, triton: eager; auto: compiled, with low memory eager."""
    memory: Memory = "default"
    """low: spikes are kept as bits until backward needs them, and normalisations are computed again; same weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    checkpoint_seconds: float = 60.0
    """Longest time between checkpoints; there is one after each epoch in any case. 0 writes one after every update."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl."""

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("implementation", self.implementation, IMPLEMENTATIONS)
        check_choice("memory", self.memory, ("default", "low"))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        if self.checkpoint_seconds < 0:
            raise ValueError(f"checkpoint_seconds is {self.checkpoint_seconds}, but must not be negative.")

    def settled(self, device: torch.device) -> Self:
        """The same, with the precision that it has on `device`; a run keeps that, and means the same elsewhere."""
        return replace(self, precision=choose_precision(self.precision, device).precision)

    def compiles(self, device: torch.device) -> bool:
        """Whether the model is compiled on `device`; raises or warns where it cannot be."""
        if self.memory == "low" and self.implementation == "auto":
            return False
        return choose(self.implementation, device, values_per_step=2**31).implementation == "compiled"


def start_processes(execution: Execution) -> "Accelerator":
    """Join the processes that `accelerate launch` started, or stand alone, and settle the device."""
    from accelerate import Accelerator

    provenance.check_device(execution.device)
    # Precision is set by autocast around the model, so that accelerate does not wrap the forward that is compiled.
    return Accelerator(cpu=execution.device == "cpu", mixed_precision="no")


def end_processes(accelerator: "Accelerator") -> None:
    """Leave together: a process that goes while another still talks to it is aborted, now and then."""
    accelerator.wait_for_everyone()
    accelerator.end_training()


def fit(
    model: nn.Module,
    loss: Loss,
    train: EpochBatches,
    test: EpochBatches,
    *,
    epochs: int,
    steps: int | None,
    optimization: Optimization,
    execution: Execution | None = None,
    out: Path | None = None,
    resume: bool = False,
    run: Mapping[str, Any] | None = None,
    accelerator: "Accelerator | None" = None,
    quiet: bool = False,
    scored_on: str = "test",
) -> Progress:
    """Train a model and evaluate it after every epoch.

    On the CPU the weights after a run that was killed and resumed, however often, equal those of an undisturbed run bit
    for bit: batches are a function of (seed, epoch, position), the learning rate of the step, and the rest is stored.

    With several processes (`accelerate launch`, torchrun) each works on its part of every global batch, and gradients
    are averaged; batch normalisation then uses the statistics of each process's part.

    Args:
        model: Called as `model(images, steps)`, returns logits `[T, B, K]`. Trained in place.
        loss: Training method, such as `DirectLoss`.
        train: Batches to train on, this process's part.
        test: Batches to evaluate on, this process's part.
        epochs: How often to go through `train`.
        steps: T; None for sequences, which bring their own.
        optimization: Optimizer and schedule.
        execution: Precision, compilation, checkpoints.
        out: Folder for the checkpoint and metrics.jsonl; None keeps nothing.
        resume: Go on from the checkpoint in `out`, if there is one.
        run: Description of the run (json), stored in the checkpoint; resuming with another one is refused.
        accelerator: From `start_processes`; made if None.
        quiet: Show nothing.
        scored_on: What `test` is, for the line of an epoch: `held-out` where it is a part of the training set.

    Returns:
        Progress with one record per epoch in `history`; the last one is the result.

    Raises:
        FloatingPointError: Loss or weights became NaN or infinite; the checkpoint on disk is from before.
        FileExistsError: `out` holds a checkpoint, and `resume` is not set.
    """
    execution = execution or Execution()
    accelerator = accelerator or start_processes(execution)
    checkpoint = None if out is None else out / CHECKPOINT
    exists = checkpoint is not None and checkpoint.exists()
    if out is not None and accelerator.is_main_process:
        remove_leftovers(out)
    if exists and not resume:
        raise FileExistsError(f"{checkpoint} exists. Pass --resume to go on with it, or another --out for a new run.")
    training = _Training(model, loss, train, steps, epochs, optimization, execution, accelerator, checkpoint, run or {})
    if exists:
        training.restore()
    progress = training.progress
    show = accelerator.is_main_process
    metrics = Metrics(out if show else None, progress.history, tensorboard=execution.tensorboard)
    try:
        with Display(epochs * len(train), progress.step, show=show and not quiet) as display:
            while progress.epoch < epochs:
                training.run_epoch(display)
                record = training.finish_epoch(test)
                metrics.add(record)
                display.say(_line(record, epochs, scored_on))
    finally:
        if execution.memory == "low":
            keep_plainly(model)
    metrics.close()
    return progress


class _Training:
    """The parts of one training and its position; `fit` drives it epoch by epoch."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: EpochBatches,
        steps: int | None,
        epochs: int,
        optimization: Optimization,
        execution: Execution,
        accelerator: "Accelerator",
        checkpoint: Path | None,
        run: Mapping[str, Any],
    ) -> None:
        self.model = lay_out(model.to(accelerator.device))
        if execution.memory == "low" and len(pack_spikes(model)) + recompute_norms(model) == 0:
            warnings.warn("memory=low has no effect: this network has no blocks that it knows.", stacklevel=3)
        self.loss = loss
        self.batches = batches
        self.steps = steps
        self.epochs = epochs
        self.optimization = optimization
        self.execution = execution
        self.accelerator = accelerator
        self.checkpoint = checkpoint
        self.run = run
        self.optimizer = optimization.build(model)
        self.trained, self.evaluated = _views(model, accelerator, execution)
        self.autocast = autocast(accelerator.device, execution.precision)
        self.progress = Progress()
        self.watch = _LossWatch(accelerator.device)
        self.clock = _Clock(self.progress)
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Go to where the checkpoint stands."""
        assert self.checkpoint is not None
        restored = load_checkpoint(self.checkpoint, self.model, self.optimizer, self.run)
        vars(self.progress).update(vars(restored))
        self.watch.restart(self.progress.epoch_loss)

    def run_epoch(self, display: Display) -> None:
        """Train on the batches of the present epoch that are still to come."""
        progress = self.progress
        compiles = self.watch.smooth is None and self.execution.compiles(self.accelerator.device)
        if compiles:
            display.update(progress.step, progress.epoch + 1, self.epochs, "compiling, once")
        begin = time.perf_counter()
        self.model.train()
        if isinstance(self.loss, EpochHook):
            self.loss.begin_epoch(self.model, progress.epoch)
        for images, labels in self.batches.epoch(progress.epoch, start=progress.batch):
            self.update(images, labels)
            if compiles:
                compiles, spent = False, time.perf_counter() - begin
                display.update(progress.step, progress.epoch + 1, self.epochs, f"compiled in {spent:.0f} s")
            if self.watch.read_now():
                self.watch.read(progress)
                display.update(progress.step, progress.epoch + 1, self.epochs, str(self.watch))
            if self._checkpoint_is_due():
                self.save()

    def update(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step. Nothing here waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.progress.step)
        with self.autocast:
            value, logits = self.loss(self.trained, channels_last(images), labels, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        if self.optimization.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optimization.clip_norm)
        self.optimizer.step()
        self.progress.step += 1
        self.progress.batch += 1
        self.watch.add(value.detach(), logits.detach(), images, labels)

    def finish_epoch(self, test: EpochBatches) -> dict[str, Any]:
        """Evaluate, keep the record of the epoch, and write a checkpoint."""
        progress = self.progress
        mean_loss = self._summed_loss() / progress.batch
        self.clock.tick()
        train_seconds = progress.epoch_seconds
        self._share_buffers()
        accuracy = self.evaluate(test)
        self.clock.tick()
        progress.epoch += 1
        record = {
            "epoch": progress.epoch,
            "step": progress.step,
            "loss": mean_loss,
            "lr": self._learning_rate(progress.step - 1),
            "accuracy": list(accuracy.accuracy),
            "ties": [ties / accuracy.total for ties in accuracy.ties],
            "silent": [silent / accuracy.total for silent in accuracy.silent],
            "train_seconds": train_seconds,
            "seconds": progress.seconds,
        }
        if accuracy.final > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch = accuracy.final, progress.epoch
        progress.history.append(record)
        progress.batch = 0
        progress.epoch_seconds = 0.0
        self.watch.restart()
        self.save()
        return record

    def evaluate(self, test: EpochBatches) -> AccuracyByStep:
        """Accuracy over all processes' parts of the test set."""
        batches = ((channels_last(images), labels) for images, labels in test.epoch(0) if len(labels))
        with self.autocast, full_float32():
            own = accuracy_by_step(self.evaluated, batches, self.steps)
        if self.accelerator.num_processes == 1:
            return own
        counts = torch.tensor([own.hits, own.ties, own.silent, [own.total] * len(own)], device=self.accelerator.device)
        hits, ties, silent, totals = map(tuple, self.accelerator.reduce(counts, "sum").tolist())
        return AccuracyByStep(hits, ties, totals[0], silent)

    def _share_buffers(self) -> None:
        """Give all processes the running averages of the first, which are those that are saved.

        Every update begins with that; the last one of an epoch has moved them apart again.
        """
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            for buffer in self.model.buffers():
                buffer.copy_(broadcast(buffer, from_process=0))

    def save(self) -> None:
        """Write the checkpoint, unless something in it is not finite."""
        self.clock.tick()
        self.progress.epoch_loss = self._summed_loss()
        if self.checkpoint is not None and self.accelerator.is_main_process:
            _check_weights(self.model, self.progress)
            save_checkpoint(self.checkpoint, self.model, self.optimizer, self.progress, self.run)
        self.saved = time.monotonic()

    def _learning_rate(self, step: int) -> float:
        return self.optimization.learning_rate(step, self.epochs * len(self.batches), len(self.batches))

    def _summed_loss(self) -> float:
        """Sum over the epoch's batches so far, averaged over processes; waits for the device and checks every loss."""
        self.watch.read(self.progress)
        return float(self.accelerator.reduce(self.watch.sum, "mean"))

    def _checkpoint_is_due(self) -> bool:
        """Processes must agree, since saving sums over them: several checkpoint at the ends of epochs, or always."""
        if self.execution.checkpoint_seconds == 0:
            return True
        overdue = time.monotonic() - self.saved > self.execution.checkpoint_seconds
        return overdue and self.accelerator.num_processes == 1


def _views(model: nn.Module, accelerator: "Accelerator", execution: Execution) -> tuple[nn.Module, nn.Module]:
    """The model as training and evaluation call it: compiled if wanted, and for training distributed if need be."""
    if not execution.compiles(accelerator.device):
        return accelerator.prepare_model(model), model
    # Two compiled objects, so that the batch size of one does not turn the other's into a variable.
    return accelerator.prepare_model(compile_whole(model)), compile_whole(model)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """The context in which a network runs at `precision`, in training and in evaluation."""
    chosen = choose_precision(precision, device).precision
    return nullcontext() if chosen == "float32" else torch.autocast(device.type, torch.bfloat16)


class _LossWatch:
    """Sums losses on the device, and reads them now and then: after every update on a CPU, rarely on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.read_every = 1 if device.type == "cpu" else 20
        self.sum = torch.zeros((), dtype=torch.float64, device=device)
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.latest: tuple[Tensor, Tensor] | None = None
        self.smooth: list[float] | None = None

    def add(self, loss: Tensor, logits: Tensor, images: Tensor, labels: Tensor) -> None:
        """Take in one update. The images are watched too, because a neuron answers a NaN with silence."""
        self.sum += loss
        self.pending.append((loss, images.sum(dtype=torch.float32)))
        self.latest = logits, labels

    def read_now(self) -> bool:
        """Whether it is time to wait for the device."""
        return len(self.pending) >= self.read_every

    def read(self, progress: Progress) -> None:
        """Look at the losses since the last reading; raises if one is not finite."""
        if not self.pending or self.latest is None:
            return
        losses, images = torch.stack([torch.stack(pair) for pair in self.pending], 1).tolist()
        first = progress.step - len(losses) + 1
        self.pending.clear()
        for update, (loss, pixels) in enumerate(zip(losses, images, strict=True), first):
            if not (math.isfinite(loss) and math.isfinite(pixels)):
                batch = progress.batch - (progress.step - update)
                what, remedy = (
                    ("the loss is not finite", "Lower --lr, or set --clip-norm 1.")
                    if math.isfinite(pixels)
                    else ("the images hold NaN or infinity", "Mend the data.")
                )
                raise FloatingPointError(
                    f"{what} at update {update} (epoch {progress.epoch + 1}, batch {batch}; loss {loss}). Training has "
                    f"stopped; the checkpoint on disk is from before. {remedy}"
                )
        logits, labels = self.latest
        # Of a mixed recording the class with the largest share counts as right.
        hits, _ = score_by_step(logits, labels.argmax(1) if labels.ndim == 2 else labels)
        now = [losses[-1], float(hits[0]) / len(labels), float(hits[-1]) / len(labels)]
        before = self.smooth or now
        self.smooth = [0.98 * old + 0.02 * new for old, new in zip(before, now, strict=True)]

    def __str__(self) -> str:
        loss, first, last = self.smooth or [math.nan] * 3
        return f"loss {loss:.3f}  train T=1 {100 * first:.1f} %  T {100 * last:.1f} %"

    def restart(self, total: float = 0.0) -> None:
        """Begin an epoch, or go on with one whose losses sum to `total`."""
        self.sum.fill_(total)


class _Clock:
    """Adds the time since the last tick to the progress."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.last = time.perf_counter()

    def tick(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self.last
        self.progress.epoch_seconds += now - self.last
        self.last = now


def _check_weights(model: nn.Module, progress: Progress) -> None:
    for name, value in model.state_dict().items():
        if value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
            raise FloatingPointError(
                f"{name} is not finite after update {progress.step}. Training has stopped; the checkpoint on disk is "
                "from before. Lower --lr, or set --clip-norm 1."
            )


def lay_out(model: nn.Module) -> nn.Module:
    """Put the weights of convolutions in channels-last order, in place; convolutions are fastest on it."""
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def channels_last(images: Tensor) -> Tensor:
    """Images `[B, C, H, W]` in the order that `lay_out` gives to weights; anything else as it is."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def _line(record: Mapping[str, Any], epochs: int, scored_on: str) -> str:
    curve = "  ".join(f"T={t} {100 * value:.2f}" for t, value in enumerate(record["accuracy"], 1))
    epoch = f"epoch {record['epoch']}/{epochs}  loss {record['loss']:.4f}"
    return f"{epoch}  {scored_on} % {curve}  {record['seconds']:.0f} s"
