import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ranvier.data import ImageSet, StreamedImages

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def image_set(labels: list[int], num_classes: int = 3) -> ImageSet:
    """Each pixel of image i is i, so that images can be told apart."""
    pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 5).contiguous()
    return ImageSet(pixels, torch.tensor(labels), tuple("abcdefghij"[:num_classes]), "letters")


def streamed(labels: list[int]) -> StreamedImages:
    """The same images as `image_set`, behind a data set."""
    images = [Image.new("RGB", (5, 4), (index, index, index)) for index in range(len(labels))]
    source = datasets.Dataset.from_dict({"picture": images}, datasets.Features({"picture": datasets.Image()}))
    return StreamedImages(source, "picture", torch.tensor(labels), ("a", "b", "c"), "letters", (3, 4, 5))


def test_attributes() -> None:
    letters = image_set([0, 1, 2, 1])
    assert (len(letters), letters.num_classes, letters.shape) == (4, 3, (3, 4, 5))


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), TypeError, r"dtype torch\.float32, expected torch\.uint8"),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), ValueError, r"shape \(2, 4, 4\), expected \[N, C, H, W\]"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2).int(), TypeError, r"labels have dtype torch\.int32"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(3).long(), ValueError, r"there are 2 images; expected \[2\]"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2, 1).long(), ValueError, r"labels have shape \[2, 1\]"),
        (torch.zeros(0, 1, 4, 4).byte(), torch.zeros(0).long(), ValueError, "the set is empty"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([1, 2]), ValueError, r"label 2 at index 1 is outside 0\.\.1"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([-1, 0]), ValueError, "label -1 at index 0 .* without them"),
    ],
)
def test_what_an_image_set_refuses(
    images: torch.Tensor, labels: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ImageSet(images, labels, ("a", "b"), "letters")


def test_statistics_by_hand() -> None:
    pixels = torch.zeros(1, 2, 2, 2, dtype=torch.uint8)
    pixels[0, 0] = torch.tensor([[0, 0], [255, 255]])  # mean 1/2, deviation 1/2
    pixels[0, 1] = 51  # mean 1/5, deviation 0
    mean, std = ImageSet(pixels, torch.zeros(1).long(), ("a",), "two channels").statistics()
    assert mean == pytest.approx((0.5, 0.2))
    assert std == pytest.approx((0.5, 0.0))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_to_moves_both_tensors(device: str) -> None:
    moved = image_set([0, 1]).to(device)
    assert moved.images.device.type == moved.labels.device.type == device
    assert torch.equal(moved.hold_out(1, seed=0)[0].labels.cpu(), image_set([0, 1]).hold_out(1, seed=0)[0].labels)
    assert moved.statistics() == image_set([0, 1]).statistics()


@given(st.lists(st.integers(0, 2), min_size=2, max_size=60), st.data())
def test_hold_out_is_a_stratified_partition(labels: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(labels) - 1))
    letters = image_set(labels)
    rest, held_out = letters.hold_out(count, seed=data.draw(st.integers(0, 9)))
    assert (len(rest), len(held_out)) == (len(labels) - count, count)
    rest_rows, held_out_rows = rest.images[:, 0, 0, 0].tolist(), held_out.images[:, 0, 0, 0].tolist()
    assert sorted(rest_rows + held_out_rows) == list(range(len(labels)))
    assert rest_rows == sorted(rest_rows)
    assert held_out_rows == sorted(held_out_rows)
    assert torch.equal(held_out.labels, letters.labels[held_out_rows])
    for label in range(3):
        share = labels.count(label) * count / len(labels)
        assert abs(int((held_out.labels == label).sum()) - share) < 1


def test_hold_out_depends_on_the_seed_only() -> None:
    letters = image_set([0, 1, 2] * 10)
    first, again, other = (letters.hold_out(9, seed)[1].images for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("count", [0, 4, -1])
def test_hold_out_refuses_to_empty_a_part(count: int) -> None:
    with pytest.raises(ValueError, match=rf"cannot hold out {count} of 4 images\. Pass 1\.\.3"):
        image_set([0, 1, 2, 1]).hold_out(count, seed=0)


def test_streamed_images_equal_images_in_memory() -> None:
    labels = [0, 1, 2, 1, 0, 0]
    letters, stream = image_set(labels), streamed(labels)
    assert (len(stream), stream.num_classes, stream.shape) == (6, 3, letters.shape)
    for index in (0, 5, -1):
        pixels, label = stream[index]
        assert torch.equal(pixels, letters.images[index])
        assert label == letters.labels[index]
    for ours, theirs in zip(stream.hold_out(3, seed=0), letters.hold_out(3, seed=0), strict=True):
        assert torch.equal(torch.stack([ours[i][0] for i in range(len(ours))]), theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
    assert stream.statistics() == letters.statistics()
    with pytest.raises(IndexError):
        stream[6]


def test_streamed_statistics_of_a_sample() -> None:
    assert streamed([0, 1, 2, 1, 0]).statistics(sample=2)[0] == pytest.approx((2 / 255,) * 3)  # images 0 and 4


def test_streamed_images_check_labels() -> None:
    with pytest.raises(ValueError, match="label 7 at index 1"):
        streamed([0, 7])


@pytest.mark.parametrize(
    ("image", "shape", "message"),
    [
        (Image.new("RGB", (5, 4)), (3, 4, 4), "image 9 is 4x5 but the first one is 4x4 .* size="),
        (Image.new("RGB", (4, 4)), (1, 4, 4), r"image 9 is in colour \(RGB\).* Pass grayscale="),
        (Image.new("I;16", (4, 4)), (1, 4, 4), "image 9 has mode I;16, expected 8 bits"),
        (Image.new("F", (4, 4)), (1, 4, 4), "image 9 has mode F, expected 8 bits"),
    ],
)
def test_conversions_that_nobody_agreed_to(image: Image.Image, shape: tuple[int, int, int], message: str) -> None:
    stream = StreamedImages([None], "image", torch.tensor([0]), ("a",), "letters", shape)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        stream.pixels(image, 9)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_and_sizes_are_converted_when_asked(mode: str, channels: int) -> None:
    image = Image.effect_noise((9, 7), 60).convert(mode)
    stream = StreamedImages(
        [None], "image", torch.tensor([0]), ("a",), "noise", (channels, 5, 6), resize=True, drop_color=True
    )  # type: ignore[arg-type]
    expected = image.convert("L" if channels == 1 else "RGB").resize((6, 5), Image.Resampling.BILINEAR)
    pixels = stream.pixels(image, 0)
    assert pixels.shape == (channels, 5, 6)
    assert np.array_equal(np.squeeze(pixels.transpose(1, 2, 0)), np.array(expected))
