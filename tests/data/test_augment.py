import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranvier.data import Augmentation, Normalization

ALL = Augmentation(crop_padding=4, flip=True, auto_augment=True, cutout=8)


def _noise(count: int, channels: int = 3, height: int = 12, width: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nothing_asked_nothing_done() -> None:
    images = _noise(5)
    assert torch.equal(Augmentation()(images, _generator()), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_input_is_kept_and_output_has_its_shape_and_type(channels: int) -> None:
    images = _noise(40, channels)
    before = images.clone()
    result = ALL(images, _generator())
    assert torch.equal(images, before)
    assert (result.shape, result.dtype) == (images.shape, torch.uint8)
    assert not torch.equal(result, before)


def test_result_follows_from_the_generator_alone() -> None:
    images = _noise(20)
    first = ALL(images, _generator(1))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(ALL(images, _generator(1)), first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert not torch.equal(ALL(images, _generator(2)), first)


@given(count=st.integers(1, 20), data=st.data())
def test_rows_are_independent_of_their_batch(count: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    images, draws = _noise(count), ALL.draw(count, _generator(3))
    whole = ALL.apply(images, draws)
    assert torch.equal(ALL.apply(images[start:stop], draws[start:stop]), whole[start:stop])


def test_switching_one_augmentation_on_leaves_the_others_as_they_were() -> None:
    images = _noise(10)
    crop, crop_and_flip = Augmentation(crop_padding=2), Augmentation(crop_padding=2, flip=True)
    cropped, both = crop(images, _generator()), crop_and_flip(images, _generator())
    for alone, flipped in zip(cropped, both, strict=True):
        assert torch.equal(flipped, alone) or torch.equal(flipped, alone.flip(2))


@given(padding=st.integers(1, 5), seed=st.integers(0, 100))
def test_crop_is_a_window_of_the_padded_image(padding: int, seed: int) -> None:
    image = _noise(1)
    padded = torch.nn.functional.pad(image, (padding,) * 4)
    window = Augmentation(crop_padding=padding)(image, _generator(seed))
    windows = [
        padded[:, :, y : y + 12, x : x + 10] for y in range(2 * padding + 1) for x in range(2 * padding + 1)
    ]  # fmt: skip
    assert any(torch.equal(window, candidate) for candidate in windows)


def test_every_window_is_equally_likely() -> None:
    count = 9000
    dot = torch.zeros(count, 1, 3, 3, dtype=torch.uint8)
    dot[:, :, 1, 1] = 1
    frequency = Augmentation(crop_padding=1)(dot, _generator()).double().mean((0, 1))
    deviation = math.sqrt(1 / 9 * 8 / 9 / count)
    assert (
        frequency - 1 / 9
    ).abs().max() < 4 * deviation  # of nine windows: p = 6e-4 at 4 sigma, and the seed is fixed


def test_half_are_flipped() -> None:
    images = torch.tensor([0, 1], dtype=torch.uint8).expand(4000, 1, 1, 2)
    flipped = Augmentation(flip=True)(images, _generator())[:, 0, 0, 0].double()
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)  # four standard deviations


@given(size=st.integers(1, 14), seed=st.integers(0, 200))
def test_cutout_is_one_rectangle_no_larger_than_asked(size: int, seed: int) -> None:
    image = _noise(1)  # no pixel is 0
    result = Augmentation(cutout=size)(image, _generator(seed))
    hole = result == 0
    assert torch.equal(result[~hole], image[~hole])
    assert torch.equal(hole[:, 0], hole[:, 1])
    rows, columns = hole[0, 0].any(1), hole[0, 0].any(0)
    assert torch.equal(hole[0, 0], rows[:, None] & columns)
    for line in (rows, columns):
        where = line.nonzero().flatten()
        assert 1 <= len(where) <= size
        assert where[-1] - where[0] + 1 == len(where)


def test_cutout_centre_is_anywhere_in_the_image() -> None:
    hit = (Augmentation(cutout=1)(_noise(4000, 1, 4, 5), _generator()) == 0).double().mean((0, 1))
    assert (hit - 1 / 20).abs().max() < 4 * math.sqrt(1 / 20 * 19 / 20 / 4000)  # four standard deviations


def test_order_is_crop_flip_policy_cutout() -> None:
    images = _noise(30)
    draws = ALL.draw(30, _generator())
    result = images
    for part in (
        Augmentation(crop_padding=4), Augmentation(flip=True), Augmentation(auto_augment=True), Augmentation(cutout=8)
    ):  # fmt: skip
        result = part.apply(result, draws)
    assert torch.equal(ALL.apply(images, draws), result)


@pytest.mark.parametrize("field", ["crop_padding", "cutout"])
def test_negative_sizes_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is -1, expected pixels >= 0"):
        Augmentation(**{field: -1})


def test_floats_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.float32, expected torch\.uint8\. Augment before normalising"):
        ALL(_noise(2).float(), _generator())


def test_draws_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images have shape \(2, 3, 12, 10\) and draws \(3, 10\)"):
        ALL.apply(_noise(2), ALL.draw(3, _generator()))


def test_generator_on_a_device_is_refused() -> None:
    class OnDevice:
        device = torch.device("cuda:0")

    with pytest.raises(ValueError, match="generator is on cuda:0, expected the CPU"):
        ALL.draw(2, OnDevice())  # type: ignore[arg-type]


def test_normalization_formula() -> None:
    images = _noise(4)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    result = Normalization(mean, std)(images)
    expected = (images.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)  # float32 rounding of values up to 3


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [((0.5,), (0.5, 0.5), "mean has 1 channels and std 2"), ((0.5,), (0.0,), r"std is \(0\.0,\), expected positive")],
)
def test_what_normalization_refuses(mean: tuple[float, ...], std: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalization(mean, std)


def test_normalization_refuses_other_images() -> None:
    normalization = Normalization((0.5,), (0.5,))
    with pytest.raises(TypeError, match="Normalise bytes, and only once"):
        normalization(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"shape \(4, 3, 12, 10\), expected \[B, C=1, H, W\]"):
        normalization(_noise(4))
