"""Where results are compared to rounding, a GPU must not round convolutions to TF32."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranvier.conversion import convert
from ranvier.evaluation import count_operations, operations
from ranvier.kernels.full_float32 import full_float32
from ranvier.models import conv4

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def set_for_convolutions() -> str:
    return torch.backends.cudnn.conv.fp32_precision


def test_it_is_set_in_the_block_only() -> None:
    before = set_for_convolutions()
    with full_float32():
        assert set_for_convolutions() == "ieee"
        with full_float32():
            pass
        assert set_for_convolutions() == "ieee"
    assert set_for_convolutions() == before
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert set_for_convolutions() == before


def test_blocks_of_two_threads_may_overlap() -> None:
    before = set_for_convolutions()
    entered, left = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with full_float32():
            entered.set()
            left.wait(60)
            seen.append(set_for_convolutions())

    thread = threading.Thread(target=other)
    with full_float32():
        thread.start()
        assert entered.wait(60)
    left.set()
    thread.join()
    assert seen == ["ieee"]
    assert set_for_convolutions() == before


def test_as_a_decorator_it_can_be_called_again() -> None:
    seen = full_float32()(set_for_convolutions)
    assert [seen(), seen()] == ["ieee", "ieee"]
    assert set_for_convolutions() != "ieee"


@pytest.mark.parametrize("allowed", [True, False])
def test_the_older_setting_can_be_read_in_the_block_and_is_put_back(allowed: bool) -> None:
    """torch refuses to read it where convolutions and recurrent layers differ: networks that set cuDNN's flags would
    fail.
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        cudnn.allow_tf32 = allowed
        newer = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
        with full_float32():
            assert not cudnn.allow_tf32
            with cudnn.flags(enabled=False):
                pass
        assert cudnn.allow_tf32 == allowed
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == newer
    finally:
        cudnn.allow_tf32 = before


def test_settings_that_the_older_one_cannot_say_are_put_back() -> None:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "tf32", "ieee"
        with full_float32():
            assert set_for_convolutions() == "ieee"
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("tf32", "ieee")
    finally:
        cudnn.allow_tf32 = before


def test_operations_are_counted_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace of the network, which compares it with the network itself, is made in it as well."""
    seen = []

    def traced(*arguments: object) -> object:
        seen.append(set_for_convolutions())
        return trace(*arguments)

    trace = operations.trace_network
    monkeypatch.setattr(operations, "trace_network", traced)
    count_operations(conv4(in_channels=1, image_size=8), [(torch.rand(2, 1, 8, 8), torch.zeros(2))], steps=2)
    assert seen == ["ieee"]


@on_a_gpu
def test_gpu_convolves_in_float32() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(64, 64, 3).cuda(), torch.randn(8, 64, 16, 16, device="cuda")

    def error(y: Tensor) -> float:
        exact = layer.double()(x.double())
        layer.float()
        return float((y - exact).abs().max() / exact.abs().max())

    with torch.no_grad(), full_float32():
        assert error(layer(x)) < 1e-5


@on_a_gpu
def test_gpu_network_with_convolutions_is_traced() -> None:
    ann = conv4(in_channels=1, image_size=8, neuron=lambda channels: nn.ReLU()).cuda()
    with full_float32():
        snn = convert(ann, torch.rand(40, 1, 8, 8), steps=2)
    assert next(snn.parameters()).device.type == "cuda"
