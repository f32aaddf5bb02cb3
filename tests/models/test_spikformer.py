from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ranvier.models import spikformer
from ranvier.models.spikformer import AttentionProduct, SelfAttention
from ranvier.nn import LIF, LIFB, Carry
from ranvier.nn.structure import Chain

EVENTS: dict[str, Any] = {"image_size": 128, "patch_size": 16, "depth": 2, "dim": 256, "heads": 16, "scale": 0.25}
IMAGENET: dict[str, Any] = {"image_size": 224, "patch_size": 16, "depth": 8, "dim": 512, "heads": 8}


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_published_parameter_counts() -> None:
    assert num_parameters(spikformer()) == 9_320_122  # published: 9.32 million
    assert num_parameters(spikformer(1000, **IMAGENET)) == 29_689_384  # 29.68
    assert num_parameters(spikformer(1000, **IMAGENET | {"dim": 384, "heads": 12})) == 16_816_024  # 16.81
    assert num_parameters(spikformer(1000, **IMAGENET | {"dim": 768, "heads": 12})) == 66_338_632  # 66.34
    # Published: 2.57 (the released code holds some more that it never uses: layer norms, a position table).
    assert num_parameters(spikformer(10, 2, **EVENTS)) == 2_566_666


def test_parameters_by_hand() -> None:
    # D = 16: stem and stages 3-2-4-8-16 and the position embedding, 3x3 without bias; normalisation of each.
    splitting = 9 * (3 * 2 + 2 * 4 + 4 * 8 + 8 * 16 + 16 * 16) + 2 * (2 + 4 + 8 + 16 + 16)
    attention = 16 * 48 + 2 * 48 + (16 * 16 + 16) + 2 * 16
    perceptron = (16 * 32 + 32) + 2 * 32 + (32 * 16 + 16) + 2 * 16
    head = 16 * 10 + 10
    network = spikformer(depth=3, dim=16, heads=2, mlp_ratio=2)
    assert num_parameters(network) == splitting + 3 * (attention + perceptron) + head


@pytest.mark.parametrize(("patch_size", "tokens"), [(1, 256), (2, 64), (4, 16), (8, 4), (16, 1)])
def test_number_of_tokens(patch_size: int, tokens: int) -> None:
    network = spikformer(image_size=16, patch_size=patch_size, depth=1, dim=16, heads=2)
    shapes: list[torch.Size] = []
    attention = next(module for module in network.modules() if isinstance(module, SelfAttention))
    attention.register_forward_hook(lambda module, inputs, output: shapes.extend([inputs[0].shape, output.shape]))
    network(torch.rand(2, 3, 16, 16), steps=3)
    assert shapes == [(3, 2, 16, tokens)] * 2


@pytest.mark.parametrize(("features", "tokens"), [(4, 9), (9, 4), (5, 5)])
def test_product_equals_attention_without_softmax(features: int, tokens: int) -> None:
    # Spikes and a scale of 1/8 are exact, so both orders must equal the sum written out.
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randint(0, 2, (3, 2, 5, 3, features, tokens), generator=generator).float()
    expected = torch.einsum("...dn,...dm,...em->...en", q, k, v) / 8
    assert torch.equal(AttentionProduct(0.125)(q, k, v), expected)


def test_heads_do_not_mix() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(8, 2, 1.0, lambda c: nn.Identity(), lambda c: nn.Identity(), "folded").eval()
    attention.merge = Chain()  # the identity
    x = torch.randn(1, 2, 8, 5)
    qkv = attention.split(x)
    q, k, v = qkv[:, :, :8], qkv[:, :, 8:16], qkv[:, :, 16:]
    for head in (slice(0, 4), slice(4, 8)):
        weights = k[:, :, head].transpose(-1, -2) @ q[:, :, head]  # [T, B, N of keys, N of queries]
        torch.testing.assert_close(attention(x)[:, :, head], v[:, :, head] @ weights)


def test_every_neuron_fires_with_its_state() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(8, 2, 0.125, LIFB, LIF, "folded")
    carry = Carry()
    attention(torch.rand(2, 3, 8, 5), carry)
    assert [tuple(state.v.shape) for state in carry.after] == [(3, 24, 5), (3, 8, 5), (3, 8, 5)]


def test_published_thresholds() -> None:
    network = spikformer(depth=1, dim=16, heads=2, neuron=partial(LIF, v_threshold=1.0), attention_neuron=LIF)
    thresholds = {name: m.params.v_threshold for name, m in network.named_modules() if isinstance(m, LIF)}
    assert [name for name, threshold in thresholds.items() if threshold == 0.5] == [
        name for name in thresholds if name.endswith("fire.neuron")
    ]
    assert len(thresholds) == 10


def test_any_image_size_on_request() -> None:
    network = spikformer(image_size=None, depth=1, dim=16, heads=2)
    assert network(torch.rand(1, 3, 12, 20), steps=1).shape == (1, 1, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 3}, "patch_size is 3, but must be one of 1, 2, 4, 8, 16"),
        ({"image_size": 30}, "image_size is 30, which patches of 4x4 do not tile"),
        ({"dim": 100}, "dim is 100, but must be a multiple of 8"),
        ({"dim": 64, "heads": 12}, "of heads=12"),
    ],
)
def test_sizes_that_do_not_fit(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spikformer(**arguments)  # type: ignore[arg-type]
