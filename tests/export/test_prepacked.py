"""Convolutions on packed weights: the same numbers for any size, and packed once for each."""

import copy

import pytest
import torch
from torch import nn

from ranvier.export import prepacked
from ranvier.export.prepacked import MOST_SIZES, Prepacked, packs
from ranvier.kernels import native_convolution, native_event_convolution

needs_events = pytest.mark.skipif(
    native_convolution.obstacle() is None or native_event_convolution.obstacle() is not None,
    reason="convolutions do not read spikes alone on this processor",
)
needs_onednn = pytest.mark.skipif(not packs(torch.float32), reason="torch without oneDNN")


@pytest.fixture
def layer() -> Prepacked:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Prepacked(conv.requires_grad_(False))


@needs_onednn
def test_sizes_come_and_go(layer: Prepacked) -> None:
    for size in (4, 8, 1, 5, 6, 4, 3, 8):
        for images in (1, 2, 3, 9, 40):
            x = torch.randn(images, 16, size, size).contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(layer(x), layer.layer(x), rtol=1e-5, atol=1e-5)
            assert len(layer._packed) <= MOST_SIZES


@needs_onednn
def test_weights_are_packed_once_for_sizes_that_are_alike(layer: Prepacked, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[list[int]] = []
    reorder = torch._C._nn.mkldnn_reorder_conv2d_weight

    def count(*arguments: object) -> torch.Tensor:
        packed.append(arguments[-1])  # type: ignore[arg-type]
        return reorder(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepacked.torch._C._nn, "mkldnn_reorder_conv2d_weight", count)
    for images in (40, 9, 8, 7, 5, 1, 40, 1):
        layer(torch.randn(images, 16, 6, 6))
    assert packed == [[8, 16, 6, 6], [1, 16, 6, 6]]
    layer.layer.weight.data = layer.layer.weight + 1  # other weights are packed anew
    x = torch.randn(8, 16, 6, 6)
    torch.testing.assert_close(layer(x), layer.layer(x), rtol=1e-5, atol=1e-4)
    assert len(packed) == 3
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


def spikes(share: float, images: int = 3) -> torch.Tensor:
    x = torch.rand(images, 16, 9, 9)
    return torch.where(x < share, 1 + x, 0).contiguous(memory_format=torch.channels_last)


@needs_events
@needs_onednn
def test_the_first_input_decides_whether_spikes_alone_are_read(layer: Prepacked) -> None:
    assert layer.reads_events is None
    nothing = layer(spikes(0.0))
    assert torch.equal(nothing, layer.layer(spikes(0.0)))
    assert layer.reads_events is None
    others = copy.deepcopy(layer)
    for which, first, then in ((layer, 0.1, 0.9), (others, 0.9, 0.1)):
        for share in (first, then, 0.0):
            x = spikes(share)
            torch.testing.assert_close(which(x), layer.layer(x), rtol=1e-5, atol=1e-5)
            assert which.reads_events is (which is layer)
    copied = copy.deepcopy(layer)
    assert copied.reads_events is True
    assert torch.equal(copied(x), layer(x))


@needs_events
@needs_onednn
def test_answers_from_spikes_do_not_depend_on_what_else_there_is(layer: Prepacked) -> None:
    x = spikes(0.2, images=40)
    whole = layer(x)
    assert layer.reads_events
    for count in (1, 3, 16):
        assert torch.equal(torch.cat([layer(part) for part in x.split(count)]), whole)
    assert torch.equal(layer(x.contiguous()), whole)  # whatever their layout
    with pytest.raises(RuntimeError):
        layer(x[:, 1:])  # and what cannot be convolved is refused as ever
    layer.layer.weight.data = 2 * layer.layer.weight  # other weights are packed anew
    torch.testing.assert_close(layer(x), layer.layer(x), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_packed_where_there_are_kernels_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for has in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        assert packs(torch.bfloat16) is has
        assert packs(torch.float32)
        assert not packs(torch.float16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not packs(torch.float32)
