import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from ranvier import models
from ranvier.data import Augmentation, Batches, load_digits
from ranvier.data.events import EventMix, FrameAugmentation, FrameSet
from ranvier.nn import LIF, LIFB, pack_spikes
from ranvier.nn.memory import PackedConv2d
from ranvier.training import CHECKPOINT, DirectLoss, Execution, Optimization, Progress, fit, read_progress
from ranvier.training.loop import _LossWatch, start_processes
from ranvier.weights import load_tensors

QUICK = Execution(precision="float32", implementation="reference", device="cpu")


def batches(count: int = 128) -> tuple[Batches, Batches]:
    splits = load_digits()
    _, few = splits.train.hold_out(count, seed=0)
    return Batches(few, 32, shuffle=True, augment=Augmentation(crop_padding=1), drop_last=True), Batches(
        splits.test, 200
    )


def network(seed: int = 0, kind: str = "mlp") -> nn.Module:
    torch.manual_seed(seed)
    if kind == "mlp":
        return models.mlp([64, 16, 10], neuron=LIFB)
    return models.vgg((4, "A", 6, "A"), num_classes=10, in_channels=1, image_size=8, neuron=LIFB, statistics="folded")


def train(out: Path | None, *, epochs: int = 2, resume: bool = False, execution: Execution = QUICK, **changes) -> tuple:
    model = changes.pop("model", None) or network()
    train_batches, test_batches = changes.pop("data", None) or batches()
    progress = fit(
        model,
        changes.pop("loss", DirectLoss("etc")),
        train_batches,
        test_batches,
        epochs=epochs,
        steps=changes.pop("steps", 2),
        optimization=changes.pop("optimization", Optimization(lr=1e-2)),
        execution=execution,
        out=out,
        resume=resume,
        quiet=True,
        **changes,
    )
    return model, progress


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_training_learns_and_keeps_its_records(tmp_path: Path) -> None:
    _, progress = train(tmp_path, epochs=16)
    assert [record["epoch"] for record in progress.history] == list(range(1, 17))
    assert progress.history[-1]["loss"] < progress.history[0]["loss"]
    assert progress.history[-1]["accuracy"][-1] > 0.3  # chance is 0.1
    assert progress.best_accuracy == max(record["accuracy"][-1] for record in progress.history)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == progress.history
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, "metrics.jsonl"]


def test_an_epoch_says_what_it_was_scored_on(capsys: pytest.CaptureFixture[str]) -> None:
    train_batches, test_batches = batches()
    for scored_on in ("test", "held-out"):
        fit(
            network(), DirectLoss("etc"), train_batches, test_batches, epochs=1, steps=2, optimization=Optimization(),
            execution=QUICK, scored_on=scored_on,
        )  # fmt: skip
        (line,) = capsys.readouterr().err.splitlines()
        assert f"  {scored_on} % T=1 " in line


def test_same_seed_same_weights() -> None:
    assert same(train(None)[0], train(None)[0])


def test_a_run_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    with pytest.raises(FileExistsError, match="--resume"):
        train(tmp_path, epochs=1)


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    model, progress = train(tmp_path)
    again, resumed = train(tmp_path, resume=True, model=network(seed=9))
    assert same(model, again)
    assert resumed.history == progress.history


class Interrupt(Exception):
    """Stands for the process dying."""


class DyingBatches:
    """Batches that end the run after a number of updates."""

    def __init__(self, inner: Batches, lives: int) -> None:
        self.inner, self.lives = inner, lives

    def __len__(self) -> int:
        return len(self.inner)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.inner.epoch(epoch, start):
            if self.lives == 0:
                raise Interrupt
            self.lives -= 1
            yield batch


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])  # the weights of convolutions are channels-last, files are contiguous
@pytest.mark.parametrize("lives", [0, 1, 3, 4, 5, 8])
def test_interrupted_anywhere_resumes_to_the_same_weights(
    tmp_path: Path, lives: int, kind: str, optimizer: Literal["adamw", "sgd"]
) -> None:
    how = {"optimization": Optimization(optimizer=optimizer, lr=1e-2), "epochs": 3}
    undisturbed, expected = train(None, model=network(kind=kind), **how)
    data, test = batches()
    each_update = Execution(precision="float32", implementation="reference", device="cpu", checkpoint_seconds=0)
    dying = (DyingBatches(data, lives), test)
    with pytest.raises(Interrupt):
        train(tmp_path, execution=each_update, data=dying, model=network(kind=kind), **how)
    torch.manual_seed(99)  # the resumed process must not depend on where its own generator stands
    resumed = network(seed=9 if lives else 0, kind=kind)
    model, progress = train(tmp_path, resume=True, model=resumed, **how)
    assert same(undisturbed, model)
    for now, before in zip(progress.history, expected.history, strict=True):
        assert now["loss"] == before["loss"]
        assert now["accuracy"] == before["accuracy"]


# Mixed recordings


def recordings(mix: EventMix | None = None) -> tuple[Batches, Batches]:
    """Twelve classes of recordings that differ in where their events are; batches of 16 of 80, of 3 steps."""
    labels = torch.arange(80) % 10
    frames = torch.zeros(80, 3, 4, 4, 4, dtype=torch.uint8)
    frames.flatten(2).scatter_(2, (labels[:, None, None] * 6 + torch.arange(6)).expand(-1, 3, -1), 4)
    held = FrameSet(frames, labels, tuple("abcdefghij"), "columns")
    augment = FrameAugmentation(drop=0.5)
    return Batches(held, 16, shuffle=True, mix=mix, augment=augment, drop_last=True), Batches(held, 80)


@pytest.mark.parametrize("loss", [DirectLoss("direct"), DirectLoss("etc", label_smoothing=0.1), DirectLoss("tet")])
def test_mixed_recordings_train(loss: DirectLoss) -> None:
    _, progress = train(None, epochs=12, data=recordings(EventMix(0.5)), loss=loss, steps=None)
    assert progress.history[-1]["accuracy"][-1] > 0.9  # chance is 0.1
    _, unmixed = train(None, epochs=1, data=recordings(), loss=loss, steps=None)
    assert progress.history[0]["loss"] != unmixed.history[0]["loss"]


@pytest.mark.parametrize("lives", [3, 5])
def test_interrupted_mixes_resume_to_the_same_weights(tmp_path: Path, lives: int) -> None:
    undisturbed, _ = train(None, data=recordings(EventMix(0.5)), steps=None)
    each_update = Execution(precision="float32", implementation="reference", device="cpu", checkpoint_seconds=0)
    data, test = recordings(EventMix(0.5))
    with pytest.raises(Interrupt):
        train(tmp_path, execution=each_update, data=(DyingBatches(data, lives), test), steps=None)
    model, _ = train(tmp_path, resume=True, model=network(seed=9), data=(data, test), steps=None)
    assert same(undisturbed, model)


def test_the_largest_share_is_the_class_of_a_mixed_recording() -> None:
    """Running accuracy: after one step the first of three is right, after two the first and the last."""
    logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [[0.0, 0.5], [0.0, 0.5], [0.0, 2.0]]])
    for labels in (torch.tensor([0, 1, 1]), torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.0, 1.0]])):
        watch = _LossWatch(torch.device("cpu"))
        watch.add(torch.tensor(2.5), logits, torch.zeros(1), labels)
        watch.read(Progress(step=1, batch=1))
        assert str(watch) == "loss 2.500  train T=1 33.3 %  T 66.7 %"


class Poisoned(DyingBatches):
    """Batches of which one holds a NaN."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.inner.epoch(epoch, start):
            self.lives -= 1
            yield (images * math.nan if self.lives == 0 else images), labels


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_nan_in_the_data_is_named_at_its_update(tmp_path: Path, kind: str) -> None:
    data, test = batches()
    with pytest.raises(FloatingPointError, match=r"images hold NaN or infinity at update 6 \(epoch 2, batch 2"):
        train(tmp_path, model=network(kind=kind), data=(Poisoned(data, 6), test))
    tensors, _ = load_tensors(tmp_path / CHECKPOINT)
    assert all(value.isfinite().all() for name, value in tensors.items() if name.startswith("model/"))


class NanLoss:
    """A loss that is NaN from the given update on."""

    def __init__(self, good: int) -> None:
        self.good = good
        self.inner = DirectLoss("direct")

    def __call__(self, forward, images: Tensor, labels: Tensor, steps: int | None) -> tuple[Tensor, Tensor]:
        value, logits = self.inner(forward, images, labels, steps)
        self.good -= 1
        return (value * math.nan if self.good < 0 else value), logits


def test_nan_stops_training_names_the_update_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    data, test = batches()
    with pytest.raises(FloatingPointError, match=r"loss is not finite at update 6 \(epoch 2, batch 2;"):
        fit(
            network(), NanLoss(5), data, test, epochs=3, steps=2, optimization=Optimization(), execution=QUICK,
            out=tmp_path, quiet=True,
        )  # fmt: skip
    assert read_progress(tmp_path / CHECKPOINT).epoch == 1
    tensors, _ = load_tensors(tmp_path / CHECKPOINT)
    assert all(value.isfinite().all() for name, value in tensors.items() if name.startswith("model/"))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(FloatingPointError, match="not finite"):
        train(tmp_path, model=model, optimization=Optimization(lr=1e38, warmup_epochs=0))
    assert not (tmp_path / CHECKPOINT).exists()


def test_gradients_are_clipped() -> None:
    model, _ = train(None, epochs=1, optimization=Optimization(optimizer="sgd", lr=1.0, clip_norm=1e-6, weight_decay=0))
    for now, before in zip(model.parameters(), network().parameters(), strict=True):
        # four updates of at most lr * clip_norm, and Nesterov adds up to a factor of 10; rounding of the weights on top
        assert (now - before).abs().max() < 4 * 10 * 1e-6 + 1e-6


def test_bfloat16_trains() -> None:
    execution = Execution(precision="bfloat16", implementation="reference", device="cpu")
    _, progress = train(None, epochs=4, execution=execution)
    assert progress.history[-1]["loss"] < progress.history[0]["loss"]


@pytest.mark.slow
def test_compiled_training_follows_the_reference() -> None:
    _, reference = train(None, epochs=2)
    compiled = Execution(precision="float32", implementation="compiled", device="cpu")
    _, progress = train(None, epochs=2, execution=compiled)
    # Same batches and same mathematics; sums are taken in another order, and a spike that flips moves the loss.
    assert progress.history[0]["loss"] == pytest.approx(reference.history[0]["loss"], rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_low_memory_trains_to_the_same_weights(precision: Literal["float32", "bfloat16"]) -> None:
    def trained(memory: Literal["default", "low"]) -> nn.Module:
        torch.manual_seed(0)
        layout = (4, 6, "A", 6)
        model = models.vgg(layout, num_classes=10, in_channels=1, image_size=8, neuron=LIF, statistics="folded")
        execution = Execution(precision, "reference" if memory == "default" else "auto", memory=memory, device="cpu")
        return train(None, model=model, epochs=1, execution=execution)[0]

    low = trained("low")
    assert same(low, trained("default"))
    assert not any(isinstance(module, PackedConv2d) for module in low.modules())  # what comes after sees plain layers
    assert pack_spikes(low)


def test_low_memory_without_effect_is_said() -> None:
    execution = Execution("float32", implementation="reference", memory="low", device="cpu")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = plain

        def forward(self, images: Tensor, steps: int | None) -> Tensor:
            return self.layers(images).expand(steps or 1, -1, -1)

    with pytest.warns(UserWarning, match="memory=low has no effect: this network has no blocks"):
        train(None, model=Plain(), epochs=1, execution=execution)


def test_sequences_bring_their_own_steps() -> None:
    class Sequences(DyingBatches):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in self.inner.epoch(epoch, start):
                yield images.flatten(1).expand(3, -1, -1), labels

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return self.epoch(0)

    data, test = batches()
    progress = fit(
        network(), DirectLoss("etc"), Sequences(data, -1), Sequences(test, -1), epochs=1, steps=None,
        optimization=Optimization(), execution=QUICK, quiet=True,
    )  # fmt: skip
    assert len(progress.history[0]["accuracy"]) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_cuda_without_a_gpu_says_so() -> None:
    with pytest.raises(RuntimeError, match="--device cpu"):
        start_processes(Execution(device="cuda"))


@pytest.mark.parametrize(
    "wrong", [{"precision": "float16"}, {"implementation": "fast"}, {"device": "tpu"}, {"checkpoint_seconds": -1}]
)
def test_wrong_execution(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Execution(**wrong)


def test_files_of_a_process_killed_while_writing_are_removed(tmp_path: Path) -> None:
    (tmp_path / f".{CHECKPOINT}.abc.tmp").write_bytes(b"half")
    train(tmp_path, epochs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, "metrics.jsonl"]


def test_progress_starts_at_nothing() -> None:
    assert Progress().best_accuracy < 0
