from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ranvier.data import Augmentation, Batches, ImageSet, Normalization, StreamedImages, evaluation_batch_size
from ranvier.data import batches as batches_module
from ranvier.data.batches import _generator
from ranvier.data.events import EventMix, FrameAugmentation, FrameSet

AUGMENT = Augmentation(crop_padding=2, flip=True, auto_augment=True, cutout=3)
NORMALIZATION = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def _noise(count: int = 23) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 6, 7), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(count), tuple(map(str, range(count))), "noise")  # label = row


def _frames(count: int = 23, dtype: torch.dtype = torch.uint8) -> FrameSet:
    counts = torch.randint(0, 9, (count, 5, 6, 7, 2), generator=torch.Generator().manual_seed(0)).to(dtype)
    frames = counts.permute(0, 1, 4, 2, 3)  # as a store has them, with the channels last in memory
    return FrameSet(frames, torch.arange(count), tuple(map(str, range(count))), "frames")  # label = row


FRAME_AUGMENT = FrameAugmentation(crop_padding=2, flip=True, shift=1, drop=0.5)


def _training_frames(frames: FrameSet, batch_size: int = 4, **settings: object) -> Batches:
    return Batches(frames, batch_size, augment=FRAME_AUGMENT, shuffle=True, seed=7, **settings)  # type: ignore[arg-type]


def _streamed(images: ImageSet) -> StreamedImages:
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.images]
    source = datasets.Dataset.from_dict({"image": pictures}, datasets.Features({"image": datasets.Image()}))
    return StreamedImages(source, "image", images.labels, images.classes, images.name, images.shape)


def _training(images: ImageSet | StreamedImages, batch_size: int = 4, **settings: object) -> Batches:
    return Batches(images, batch_size, augment=AUGMENT, normalization=NORMALIZATION, shuffle=True, seed=7, **settings)  # type: ignore[arg-type]


def _assert_same(ours: object, theirs: object) -> None:
    for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):  # type: ignore[call-overload]
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_evaluation_sees_every_image_once_in_order() -> None:
    noise = _noise()
    batches = Batches(noise, 5)
    assert len(batches) == 5
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(images, noise.images / 255)
    assert torch.equal(labels, noise.labels)


def test_dtypes() -> None:
    for batches in (Batches(_noise(), 5), _training(_noise())):
        images, labels = next(iter(batches))
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_training_shuffles_anew_each_epoch() -> None:
    batches = _training(_noise())
    orders = [torch.cat([labels for _, labels in batches.epoch(epoch)]).tolist() for epoch in (0, 1, 0)]
    assert orders[0] == orders[2]
    assert len({tuple(order) for order in orders}) == 2
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(23))
    assert orders[0] != sorted(orders[0])


def test_augmentation_differs_between_epochs_and_batches() -> None:
    same = ImageSet(_noise(1).images.expand(8, -1, -1, -1), torch.zeros(8).long(), ("a",), "the same image")
    batches = Batches(same, 4, augment=AUGMENT)
    (first, _), (second, _) = batches.epoch(0)
    other_epoch = next(batches.epoch(1))[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first, other_epoch)


def test_seed_decides() -> None:
    first = [labels.tolist() for _, labels in Batches(_noise(), 4, shuffle=True, seed=1)]
    assert first != [labels.tolist() for _, labels in Batches(_noise(), 4, shuffle=True, seed=2)]


@given(start=st.integers(0, 6), epoch=st.integers(0, 3))
def test_resuming_equals_never_having_stopped(start: int, epoch: int) -> None:
    batches = _training(_noise())
    _assert_same(batches.epoch(epoch, start), islice(batches.epoch(epoch), start, None))


@given(share=st.integers(1, 3), world=st.integers(1, 4), drop_last=st.booleans())
@settings(max_examples=20)
def test_ranks_together_see_what_one_process_sees(share: int, world: int, drop_last: bool) -> None:
    noise, size = _noise(), share * world
    ranks = [_training(noise, size, rank=rank, world=world, drop_last=drop_last).epoch(1) for rank in range(world)]
    joined = [tuple(torch.cat(parts) for parts in zip(*batch, strict=True)) for batch in zip(*ranks, strict=True)]
    _assert_same(joined, _training(noise, size, drop_last=drop_last).epoch(1))


def test_full_batches_are_split_evenly_and_the_last_one_as_far_as_it_goes() -> None:
    sizes = [[len(labels) for _, labels in Batches(_noise(10), 8, rank=rank, world=4)] for rank in range(4)]
    assert sizes == [[2, 0], [2, 1], [2, 0], [2, 1]]


def test_empty_share_is_augmented_too() -> None:
    images, labels = list(_training(_noise(10), 8, rank=0, world=4))[-1]
    assert images.shape == (0, 3, 6, 7)
    assert labels.shape == (0,)


def test_drop_last() -> None:
    batches = Batches(_noise(), 4, drop_last=True)
    assert len(batches) == 5
    assert [len(labels) for _, labels in batches] == [4] * 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_batches_equal_batches_in_memory(num_workers: int) -> None:
    noise = _noise()
    stream = _streamed(noise)
    _assert_same(_training(stream, num_workers=num_workers).epoch(2, 3), _training(noise).epoch(2, 3))
    uneven = {"rank": 0, "world": 4, "num_workers": num_workers}
    _assert_same(_training(stream, 20, **uneven).epoch(0), _training(noise, 20, rank=0, world=4).epoch(0))


def test_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    list(_training(_noise()))
    list(_training(_streamed(_noise()), num_workers=0))
    assert torch.equal(torch.get_rng_state(), state)


def test_device_defaults_to_where_the_images_are() -> None:
    assert Batches(_noise(), 4).device.type == "cpu"
    assert Batches(_streamed(_noise()), 4).device.type == "cpu"
    assert Batches(_streamed(_noise()), 4, device="meta").device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stream", [False, True])
def test_device_does_not_change_what_comes(stream: bool) -> None:
    images = _streamed(_noise()) if stream else _noise()
    for (ours, labels), (expected, expected_labels) in zip(
        _training(images, device="cuda").epoch(1), _training(_noise()).epoch(1), strict=True
    ):
        assert ours.device.type == labels.device.type == "cuda"
        assert torch.equal(labels.cpu(), expected_labels)
        torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-6)  # multiply-add may be fused


@pytest.mark.parametrize(
    ("batch_size", "arguments", "message"),
    [
        (0, {}, "batch_size is 0, expected at least 1"),
        (4, {"rank": 2, "world": 2}, "rank is 2 of world 2"),
        (6, {"world": 4}, "batch_size 6 cannot be split evenly over 4 processes.* pass a multiple of 4, such as 8"),
        (24, {"drop_last": True}, "drop_last leaves no batch: noise has 23 images, batch_size is 24"),
        (4, {"seed": -1}, "seed is -1, expected at least 0"),
    ],
)
def test_what_batches_refuse(batch_size: int, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(_noise(), batch_size, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 7)])
def test_what_epoch_refuses_at_the_call(epoch: int, start: int) -> None:
    with pytest.raises(ValueError, match=rf"epoch is {epoch}, start {start}; expected epoch >= 0 and start in 0\.\.6"):
        _training(_noise()).epoch(epoch, start)


def test_order_and_augmentation_share_no_randomness() -> None:
    """(3,) and (3, 0) must not be padded to the same key."""
    keys = [(7,), (7, 0), (7, 3), (7, 3, 0), (7, 0, 3), (3, 7), (7, 3, 1)]
    assert len({_generator(*key).initial_seed() for key in keys}) == len(keys)


def test_order_and_randomness_never_change() -> None:
    """Runs are comparable over versions only while these stay what they are."""
    batches = _training(_noise())
    images, labels = next(batches.epoch(3, start=2))
    assert labels.tolist() == [16, 18, 1, 9]
    assert images.double().sum().item() == pytest.approx(-363.7712, abs=1e-3)  # 504 values in float32


# ---------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float32])
@pytest.mark.parametrize("contiguous", [False, True])
def test_frames_come_time_first_as_raw_counts(dtype: torch.dtype, contiguous: bool) -> None:
    held = _frames(dtype=dtype)
    if contiguous:
        held = FrameSet(held.frames.contiguous(), held.labels, held.classes, held.name)
    before = held.frames.clone()
    frames, labels = zip(*Batches(held, 5), strict=True)
    assert [batch.shape for batch in frames] == [(5, 5, 2, 6, 7)] * 4 + [(5, 3, 2, 6, 7)]
    assert {batch.dtype for batch in frames} == {torch.float32}
    assert torch.equal(torch.cat(frames, 1), before.transpose(0, 1).float())
    assert torch.equal(torch.cat(labels), held.labels)
    for batch in frames:
        batch.zero_()
    assert torch.equal(held.frames, before)


@pytest.mark.parametrize("augment", [None, FRAME_AUGMENT])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_folded_frames_are_a_view_with_the_channels_last(augment: FrameAugmentation | None, batch_size: int) -> None:
    frames, _ = next(iter(Batches(_frames(), batch_size, augment=augment)))
    folded = frames.flatten(0, 1)
    assert folded.data_ptr() == frames.data_ptr()
    assert folded.is_contiguous(memory_format=torch.channels_last)


def test_a_part_of_a_set_of_frames() -> None:
    rest, held_out = _frames().hold_out(7, seed=0)
    for part in (rest, held_out):
        (frames, labels), *_ = Batches(part, 23)
        assert torch.equal(frames, _frames().frames[labels].transpose(0, 1).float())
        assert torch.equal(labels, part.labels)


@given(start=st.integers(0, 6), epoch=st.integers(0, 3), balanced=st.booleans())
@settings(max_examples=20)
def test_resuming_frames_equals_never_having_stopped(start: int, epoch: int, balanced: bool) -> None:
    batches = _training_frames(_frames(), balanced=balanced)
    _assert_same(batches.epoch(epoch, start), islice(batches.epoch(epoch), start, None))


@given(share=st.integers(1, 3), world=st.integers(1, 4), balanced=st.booleans())
@settings(max_examples=20)
def test_ranks_together_see_the_frames_that_one_process_sees(share: int, world: int, balanced: bool) -> None:
    held, size = _frames(), share * world
    ranks = [_training_frames(held, size, rank=rank, world=world, balanced=balanced).epoch(1) for rank in range(world)]
    for (frames, labels), *others in zip(_training_frames(held, size, balanced=balanced).epoch(1), *ranks, strict=True):
        assert torch.equal(torch.cat([part for part, _ in others], 1), frames)
        assert torch.equal(torch.cat([part for _, part in others]), labels)


def test_an_empty_share_of_frames_is_augmented_too() -> None:
    frames, labels = list(_training_frames(_frames(10), 8, rank=0, world=4))[-1]
    assert frames.shape == (5, 0, 2, 6, 7)
    assert labels.shape == (0,)


def test_frames_and_images_come_in_the_same_order() -> None:
    for balanced in (False, True):
        images, frames = _training(_noise(), balanced=balanced), _training_frames(_frames(), balanced=balanced)
        assert [labels.tolist() for _, labels in images] == [labels.tolist() for _, labels in frames]


def test_order_and_randomness_of_frames_never_change() -> None:
    """Runs are comparable over versions only while these stay what they are."""
    frames, labels = next(_training_frames(_frames()).epoch(3, start=2))
    assert labels.tolist() == [16, 18, 1, 9]
    assert (frames.long().flatten() * torch.arange(frames.numel())).sum() == 2774249
    assert next(_training_frames(_frames(), balanced=True).epoch(3, start=2))[1].tolist() == [18, 14, 9, 18]


def test_frames_are_read_from_a_file_row_by_row(tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", _frames().frames.permute(0, 1, 3, 4, 2).numpy())
    mapped = torch.from_numpy(np.lib.format.open_memmap(tmp_path / "frames.npy", mode="c")).permute(0, 1, 4, 2, 3)
    stored = FrameSet(mapped, _frames().labels, _frames().classes, "stored")
    _assert_same(_training_frames(stored).epoch(1), _training_frames(_frames()).epoch(1))


def test_frames_stay_where_they_are_on_a_cpu() -> None:
    held = _frames()
    for device in (None, "cpu"):
        batches = Batches(held, 4, device=device)
        assert batches.device.type == "cpu"
        assert batches.images is held
    frames, labels = next(iter(Batches(held, 4, device="meta")))
    assert frames.device.type == labels.device.type == "meta"
    assert frames.shape == (5, 4, 2, 6, 7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16])
def test_device_does_not_change_frames(share: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_SHARE_OF_MEMORY", share)
    held, _ = _frames(dtype=dtype).hold_out(3, seed=0)
    batches = _training_frames(held, device="cuda", balanced=True)
    assert isinstance(batches.images, FrameSet)
    assert batches.images.frames.device.type == ("cuda" if share else "cpu")
    for (ours, labels), (expected, expected_labels) in zip(
        batches.epoch(1), _training_frames(held, balanced=True).epoch(1), strict=True
    ):
        assert ours.device.type == labels.device.type == "cuda"
        assert torch.equal(labels.cpu(), expected_labels)
        assert torch.equal(ours.cpu(), expected)
        assert ours.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_the_other_kind_of_augmentation_is_refused() -> None:
    with pytest.raises(
        TypeError, match="augment is an Augmentation, but frames holds frames. Pass a FrameAugmentation"
    ):
        Batches(_frames(), 4, augment=AUGMENT)
    with pytest.raises(TypeError, match="augment is a FrameAugmentation, but noise holds images. Pass an Augmentation"):
        Batches(_noise(), 4, augment=FRAME_AUGMENT)
    with pytest.raises(ValueError, match="frames holds frames, which are raw counts. Pass None"):
        Batches(_frames(), 4, normalization=NORMALIZATION)
    with pytest.raises(ValueError, match="frames has 23 recordings, batch_size is 24"):
        Batches(_frames(), 24, drop_last=True)


# ----------------------------------------------------------------------------------------------------------- mixed

MIX = EventMix(0.7)


def _resized(dtype: torch.dtype) -> FrameSet:
    """Frames as resizing leaves them: no whole numbers, so that the order of a sum may show."""
    held = _frames()
    parts = torch.rand(held.frames.shape, generator=torch.Generator().manual_seed(1))
    return FrameSet((held.frames * parts).to(dtype), held.labels, held.classes, held.name)


@given(
    share=st.integers(1, 4),
    world=st.sampled_from([1, 2, 4]),
    balanced=st.booleans(),
    augmented=st.booleans(),
    dtype=st.sampled_from([None, torch.float16, torch.float32]),
    epoch=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_ranks_together_see_the_mixes_that_one_process_sees(
    share: int, world: int, balanced: bool, augmented: bool, dtype: torch.dtype | None, epoch: int
) -> None:
    held, size = _frames() if dtype is None else _resized(dtype), share * world
    how = {
        "balanced": balanced,
        "shuffle": True,
        "seed": 7,
        "mix": MIX,
        "augment": FRAME_AUGMENT if augmented else None,
    }
    ranks = [Batches(held, size, rank=rank, world=world, **how).epoch(epoch) for rank in range(world)]  # type: ignore[arg-type]
    one = Batches(held, size, **how)  # type: ignore[arg-type]
    for (frames, targets), *others in zip(one.epoch(epoch), *ranks, strict=True):
        assert torch.equal(torch.cat([part for part, _ in others], 1), frames)
        assert torch.equal(torch.cat([part for _, part in others]), targets)


@given(start=st.integers(0, 6), epoch=st.integers(0, 3), balanced=st.booleans())
@settings(max_examples=20)
def test_resuming_mixes_equals_never_having_stopped(start: int, epoch: int, balanced: bool) -> None:
    batches = _training_frames(_frames(), balanced=balanced, mix=MIX)
    _assert_same(batches.epoch(epoch, start), islice(batches.epoch(epoch), start, None))


def test_a_mix_is_that_of_the_augmented_batch() -> None:
    mixed = _training_frames(_frames(), mix=MIX).epoch(2)
    for batch, (frames, labels) in enumerate(_training_frames(_frames()).epoch(2)):
        draws = MIX.draw(len(labels), (5, 6, 7), _generator(7, 2, batch, 1))
        expected, targets = MIX.apply(frames.transpose(0, 1), labels, 23, draws)
        ours, theirs = next(mixed)
        assert torch.equal(ours, expected.transpose(0, 1))
        assert torch.equal(theirs, targets)
        assert (ours.dtype, theirs.dtype, theirs.shape) == (torch.float32, torch.float32, (len(labels), 23))
        assert ours.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert next(mixed, None) is None


def test_mixes_differ_between_epochs_and_batches() -> None:
    frames = torch.arange(8, dtype=torch.uint8)[:, None, None, None, None].expand(-1, 3, 2, 6, 7)
    held = FrameSet(frames, torch.arange(8), tuple("abcdefgh"), "numbers")
    batches = Batches(held, 4, mix=EventMix(1.0))
    (_, first), (_, second) = batches.epoch(0)
    _, other_epoch = next(batches.epoch(1))
    _, other_seed = next(Batches(held, 4, mix=EventMix(1.0), seed=1).epoch(0))
    assert first[:, 4:].sum() == second[:, :4].sum() == 0  # partners are of the same batch
    for other in (second.roll(4, 1), other_epoch, other_seed):
        assert not torch.equal(first, other)


def test_where_nothing_is_mixed_nothing_changes() -> None:
    unmixed = _training_frames(_frames())
    for (frames, targets), (expected, labels) in zip(
        _training_frames(_frames(), mix=EventMix(0.0)), unmixed, strict=True
    ):
        assert torch.equal(frames, expected)
        assert torch.equal(targets, torch.eye(23)[labels])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_no_recording_is_read_or_augmented_twice(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    augmented: list[int] = []
    read_rows, augment = FrameSet.read, FrameAugmentation.apply
    monkeypatch.setattr(FrameSet, "read", lambda held, rows: read.append(rows.tolist()) or read_rows(held, rows))
    monkeypatch.setattr(FrameAugmentation, "apply", lambda *given: augmented.append(len(given[1])) or augment(*given))
    draws = MIX.draw(12, (5, 6, 7), _generator(7, 0, 0, 1))
    order = torch.cat([labels for _, labels in _training_frames(_frames(), 12).epoch(0)])[:12]  # label = row
    for rank in range(world):
        read.clear()
        augmented.clear()
        next(_training_frames(_frames(), 12, mix=MIX, rank=rank, world=world).epoch(0))
        own = slice(rank * 12 // world, (rank + 1) * 12 // world)
        needed = {*draws.own[own].tolist(), *draws.partner[own].tolist()}
        assert read == [order[sorted(needed)].tolist()]
        assert augmented == [len(needed)]
        assert world > 1 or len(needed) == 12


def test_an_empty_share_of_a_mix() -> None:
    frames, targets = list(_training_frames(_frames(10), 8, rank=0, world=4, mix=MIX))[-1]
    assert frames.shape == (5, 0, 2, 6, 7)
    assert targets.shape == (0, 10)


def test_mixes_never_change() -> None:
    """Runs are comparable over versions only while these stay what they are."""
    frames, targets = next(_training_frames(_frames(), mix=MIX).epoch(3, start=2))
    assert (frames.long().flatten() * torch.arange(frames.numel())).sum() == 3015984
    assert [(row > 0).nonzero().flatten().tolist() for row in targets] == [[16], [1, 18], [1, 18], [9]]


def test_frames_are_mixed_where_the_device_is() -> None:
    frames, targets = next(iter(Batches(_frames(), 4, device="meta", mix=MIX)))
    assert frames.device.type == targets.device.type == "meta"
    assert (frames.shape, targets.shape) == ((5, 4, 2, 6, 7), (4, 23))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_device_does_not_change_mixes(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_SHARE_OF_MEMORY", share)
    for (ours, targets), (expected, expected_targets) in zip(
        _training_frames(_frames(), device="cuda", mix=MIX).epoch(1),
        _training_frames(_frames(), mix=MIX).epoch(1),
        strict=True,
    ):
        assert torch.equal(ours.cpu(), expected)
        torch.testing.assert_close(targets.cpu(), expected_targets)  # multiply-add may be fused


@pytest.mark.parametrize("stream", [False, True])
def test_images_are_not_mixed(stream: bool) -> None:
    with pytest.raises(TypeError, match=r"mix is an EventMix, but noise holds images\. Pass None"):
        Batches(_streamed(_noise()) if stream else _noise(), 4, mix=MIX)


# -------------------------------------------------------------------------------------------------------- balanced


def _unbalanced(counts: tuple[int, ...]) -> ImageSet:
    labels = torch.cat([torch.full((count,), index) for index, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return ImageSet(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels, tuple(map(str, counts)), "unbalanced")


def test_balanced_epochs_hold_all_classes_equally_often() -> None:
    unbalanced = _unbalanced((900, 90, 0, 10))
    drawn: Counter[int] = Counter()
    for epoch in range(30):
        batches = Batches(unbalanced, 64, balanced=True, seed=1)
        assert len(batches) == 16
        drawn.update(torch.cat([labels for _, labels in batches.epoch(epoch)]).tolist())
    assert sum(drawn.values()) == 30 * 1000
    assert sorted(drawn) == [0, 1, 3]
    for count in drawn.values():
        assert abs(count - 10_000) < 410  # five standard deviations


def test_all_images_of_a_class_are_drawn_equally_often() -> None:
    twelve = ImageSet(
        torch.arange(12, dtype=torch.uint8)[:, None, None, None],
        torch.tensor([0] * 10 + [1] * 2),
        ("many", "few"),
        "twelve",
    )
    batches = Batches(twelve, 12, balanced=True)
    drawn = torch.cat([(images * 255).round().flatten() for epoch in range(1000) for images, _ in batches.epoch(epoch)])
    counts = drawn.long().bincount(minlength=12)
    assert (counts[:10] - 600).abs().max() < 120  # five standard deviations
    assert (counts[10:] - 3000).abs().max() < 240


def test_balanced_epochs_differ_and_follow_from_the_seed() -> None:
    def order(epoch: int, **settings: object) -> list[int]:
        batches = Batches(_noise(), 4, balanced=True, **settings)  # type: ignore[arg-type]
        return torch.cat([labels for _, labels in batches.epoch(epoch)]).tolist()

    assert order(0) == order(0) == order(0, shuffle=True)
    assert len({tuple(order(0)), tuple(order(1)), tuple(order(0, seed=1))}) == 3


@pytest.mark.parametrize(
    ("threads", "steps", "image_size", "expected"),
    [
        (2, 1, 32, 64),
        (2, 2, 32, 64),
        (2, 4, 32, 32),
        (2, 16, (32, 32), 8),
        (2, 32, 32, 8),
        (2, 4, 64, 8),
        (2, 4, (16, 32), 64),
        (16, 4, 32, 256),
        (64, 1, 32, 500),
        (1, 4, (), 500),
        (1, 4, 0, 500),
    ],
)
def test_batches_to_evaluate_fit_into_caches(
    threads: int, steps: int, image_size: int | tuple[int, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert evaluation_batch_size(steps, image_size=image_size) == expected
    assert evaluation_batch_size(steps, torch.device("cuda"), image_size=image_size) == 500


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_batches_to_evaluate_need_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        evaluation_batch_size(steps, "cuda")
