"""Pillow is the oracle: the policy was searched with its operations, and ours must equal them pixel for pixel."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from ranvier.data import autoaugment
from ranvier.data.autoaugment import CIFAR10_POLICY, NUM_DRAWS, OPERATIONS, auto_augment

FACTORS = [0.1, 0.5, 0.9, 1.0, 1.3, 1.7, 1.9]
SHIFTS = [-14.5, -4.833, -0.4, 0.0, 0.6, 9.25]


def _affine(*matrix: float) -> Callable[[Image.Image], Image.Image]:
    def transform(image: Image.Image) -> Image.Image:
        fill = 128 if image.mode == "L" else (128, 128, 128)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill)

    return transform


def _rotate(degrees: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.rotate(degrees, fillcolor=128 if image.mode == "L" else (128, 128, 128))


ORACLES: list[tuple[str, float, Callable[[Image.Image], Image.Image]]] = [
    ("invert", 0.0, ImageOps.invert),
    ("autocontrast", 0.0, ImageOps.autocontrast),
    ("equalize", 0.0, ImageOps.equalize),
    *[("posterize", bits, lambda image, bits=bits: ImageOps.posterize(image, bits)) for bits in range(1, 9)],
    *[("solarize", t, lambda image, t=t: ImageOps.solarize(image, t)) for t in (0, 28.4, 128, 199.1, 256)],
    *[("brightness", f, lambda image, f=f: ImageEnhance.Brightness(image).enhance(f)) for f in FACTORS],
    *[("contrast", f, lambda image, f=f: ImageEnhance.Contrast(image).enhance(f)) for f in FACTORS],
    *[("color", f, lambda image, f=f: ImageEnhance.Color(image).enhance(f)) for f in FACTORS],
    *[("sharpness", f, lambda image, f=f: ImageEnhance.Sharpness(image).enhance(f)) for f in FACTORS],
    *[("translate_x", s, _affine(1, 0, s, 0, 1, 0)) for s in SHIFTS],
    *[("translate_y", s, _affine(1, 0, 0, 0, 1, s)) for s in SHIFTS],
    *[("shear_y", s, _affine(1, 0, 0, s, 1, 0)) for s in (-0.3, -0.2667, 0.1, 0.2333)],
    *[("rotate", degrees, _rotate(degrees)) for degrees in (-30.0, -6.6667, 0.0, 6.6667, 17.3, 30.0)],
]  # fmt: skip


def _samples(channels: int) -> torch.Tensor:
    """Noise, a dark and a bright range, a ramp, few levels, two levels, flat, black, one bright pixel."""
    random = np.random.default_rng(3)
    shape = (channels, 32, 30)
    ramp = np.broadcast_to(np.arange(30) * 7 + np.arange(32)[:, None], shape)
    dot = np.zeros(shape)
    dot[:, 5, 7] = 200
    images = [
        random.integers(0, 256, shape), random.integers(10, 90, shape), random.integers(120, 250, shape), ramp,
        random.integers(0, 5, shape) * 50, random.integers(0, 2, shape) * 255, np.full(shape, 77), np.zeros(shape), dot,
    ]  # fmt: skip
    return torch.from_numpy(np.stack(images).astype(np.uint8))


def _with_pillow(image: torch.Tensor, operation: Callable[[Image.Image], Image.Image]) -> torch.Tensor:
    pixels = image.numpy()
    result = operation(Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))
    return torch.from_numpy(np.atleast_3d(np.array(result)).transpose(2, 0, 1).copy())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "amount", "oracle"), ORACLES)
def test_operation_equals_pillow(
    name: str, amount: float, oracle: Callable[[Image.Image], Image.Image], channels: int
) -> None:
    images = _samples(channels)
    before = images.clone()
    result = OPERATIONS[name](images, torch.full((len(images),), amount, dtype=torch.float64))
    assert torch.equal(images, before), "the caller's images were changed"
    for index, image in enumerate(images):
        assert torch.equal(result[index], _with_pillow(image, oracle)), f"sample {index}"


def test_every_operation_has_an_oracle() -> None:
    assert {name for name, _, _ in ORACLES} == set(OPERATIONS)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_images_do_not_influence_each_other(name: str) -> None:
    images = _samples(3)
    scale = 8 if name == "posterize" else 1
    amounts = torch.linspace(0.125, 1, len(images), dtype=torch.float64) * scale
    together = OPERATIONS[name](images, amounts)
    alone = [OPERATIONS[name](images[i : i + 1], amounts[i : i + 1]) for i in range(len(images))]
    assert torch.equal(together, torch.cat(alone))


def test_policy_is_the_published_one() -> None:
    """Table 7 of the paper, as kornia has it (its order and spelling)."""
    from kornia.augmentation.auto.autoaugment.autoaugment import cifar10_policy as oracle

    ours = [[(step.operation, step.probability, step.magnitude) for step in pair] for pair in CIFAR10_POLICY]
    theirs = [
        [(name.replace("auto_contrast", "autocontrast"), chance, magnitude or 0) for name, chance, magnitude in pair]
        for pair in oracle
    ]
    assert ours == theirs


@pytest.mark.parametrize(
    ("operation", "magnitude", "expected"),
    [
        ("posterize", 7, 5),  # 8 - 28/9 = 4.89
        ("solarize", 2, 256 * 7 / 9),
        ("rotate", 2, 60 / 9),
        ("shear_y", 8, 0.8 / 3),
        ("translate_x", 9, 150 / 331),
        ("color", 9, 1.9),
        ("brightness", 3, 1.3),
        ("contrast", 0, 1.0),
    ],
)
def test_magnitudes_of_the_published_ranges(operation: str, magnitude: int, expected: float) -> None:
    assert autoaugment._AMOUNTS[operation](magnitude, 1) == pytest.approx(expected, rel=1e-12)


def _draws(sub_policy: int, *, first: bool, second: bool, signs: tuple[float, float] = (0.0, 0.0)) -> torch.Tensor:
    choice = (sub_policy + 0.5) / len(CIFAR10_POLICY)
    return torch.tensor([[choice, 0.0 if first else 0.999, 0.0 if second else 0.999, *signs]], dtype=torch.float64)


def test_steps_run_in_order_with_their_magnitude() -> None:
    image = _samples(3)[:1]
    result = auto_augment(image, _draws(5, first=True, second=True))  # shear_y 7, posterize 7
    sheared = _affine(1, 0, 0, 0.3 * 7 / 9, 1, 0)
    assert torch.equal(result[0], _with_pillow(image[0], lambda pil: ImageOps.posterize(sheared(pil), 5)))


def test_translation_is_a_share_of_its_own_side() -> None:
    image = _samples(3)[:1]
    result = auto_augment(image, _draws(1, first=False, second=True))  # translate_x 9 on 32 x 30
    assert torch.equal(result[0], _with_pillow(image[0], _affine(1, 0, 150 / 331 * 30, 0, 1, 0)))


def test_sign_is_drawn() -> None:
    image = _samples(3)[:1]
    result = auto_augment(image, _draws(7, first=False, second=True, signs=(0.0, 0.7)))  # brightness 9
    assert torch.equal(result[0], _with_pillow(image[0], lambda pil: ImageEnhance.Brightness(pil).enhance(0.1)))


def test_without_chance_nothing_happens() -> None:
    images = _samples(3)
    draws = torch.full((len(images), NUM_DRAWS), 0.999, dtype=torch.float64)
    assert torch.equal(auto_augment(images, draws), images)


def test_probability_zero_never_applies() -> None:
    images = _samples(3)[:1]
    assert torch.equal(auto_augment(images, _draws(14, first=False, second=True)), images)  # invert with 0.0


def test_batch_equals_one_by_one_and_keeps_its_input() -> None:
    images = _samples(3).repeat(20, 1, 1, 1)
    before = images.clone()
    draws = torch.rand(len(images), NUM_DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = auto_augment(images, draws)
    alone = [auto_augment(images[i : i + 1], draws[i : i + 1]) for i in range(len(images))]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(images, before)


def test_empty_batch() -> None:
    images, draws = torch.empty(0, 3, 8, 8, dtype=torch.uint8), torch.empty(0, NUM_DRAWS, dtype=torch.float64)
    assert auto_augment(images, draws).shape == images.shape


def test_other_channel_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="images have 2 channels, AutoAugment expects 1 or 3"):
        auto_augment(torch.zeros(1, 2, 8, 8, dtype=torch.uint8), torch.zeros(1, NUM_DRAWS, dtype=torch.float64))
