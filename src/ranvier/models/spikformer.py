"""Spikformer: a vision transformer whose queries, keys and values are spikes.

Tokens are channels-first, `[T, B, D, N]`: D features of N tokens, so that the channel axis is the third everywhere.
"""

from torch import Tensor, nn

from ranvier.models.network import Network
from ranvier.nn import LIF, BatchNorm, Carry, Readout, TimeFolded
from ranvier.nn.normalization import Statistics
from ranvier.nn.structure import Block, Chain, NeuronFactory, Residual, activation, conv_norm

PATCH_SIZES = (1, 2, 4, 8, 16)
"""Pixels along one side of a token; each halving takes one of the four stages of the patch splitting."""


def spikformer(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    image_size: int | None = 32,
    patch_size: int = 4,
    depth: int = 4,
    dim: int = 384,
    heads: int = 12,
    mlp_ratio: int = 4,
    scale: float = 0.125,
    neuron: NeuronFactory = LIF,
    attention_neuron: NeuronFactory | None = None,
    statistics: Statistics = "folded",
) -> Network:
    """Spikformer: convolutions split the image into tokens, then come blocks of self-attention and perceptron.

        x = p + neuron(BN(conv(p))),   p = four stages of neuron(BN(conv(.))) and pooling       position embedding
        x = x + attention(x),  x = x + perceptron(x)                                            `depth` times
        logits = W mean over tokens(x) + b

    The published sizes, with their parameters in millions:

        9.32   4-384, CIFAR    spikformer(10)
        2.57   2-256, events   spikformer(10, 2, image_size=128, patch_size=16, depth=2, dim=256, heads=16, scale=0.25)
        29.69  8-512, ImageNet spikformer(1000, image_size=224, patch_size=16, depth=8, dim=512, heads=8)

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        image_size: Height and width of the images; None takes any, since no weight depends on the number of tokens.
        patch_size: Pixels along one side of a token: 1, 2, 4, 8 or 16. The last 0 to 4 stages halve the image.
        depth: Number of blocks.
        dim: D, features of a token; the four stages have D/8, D/4, D/2 and D channels.
        heads: Attention heads, each on D/heads features.
        mlp_ratio: Width of the perceptron's hidden layer over D.
        scale: Factor on the attention product, before its neuron.
        neuron: Activation, called with its channel count.
        attention_neuron: Activation after the attention product, if it is to differ from `neuron`.
        statistics: Batch statistics over all steps (`folded`, as published) or each step (`per_step`).

    Returns:
        A network on `[B, C, H, W]` or `[T, B, C, H, W]`.

    Raises:
        ValueError: Unknown patch size, patches that do not tile the image, or `dim` that 8 or `heads` does not divide.

    Source: Zhou et al. 2023 (ICLR) and its released code. Where the released variants differ, the published parameter
    counts decide: the linear layers of queries, keys and values have no bias, all others do. Differs from it in:
    thresholds, which are 0.5 unless the caller says otherwise (published: 1 except after the attention product, which
    is `neuron=partial(LIF, v_threshold=1.0), attention_neuron=LIF`); queries, keys and values come from one layer of
    3 D channels, the same function as three (PLIF then learns one time constant for them); initial weights; no dropout
    and none of the layer norms that the released code holds but does not use.

    >>> import torch
    >>> net = spikformer(10, image_size=16, depth=1, dim=16, heads=2)
    >>> net(torch.zeros(2, 3, 16, 16), steps=4).shape
    torch.Size([4, 2, 10])
    """
    if patch_size not in PATCH_SIZES:
        raise ValueError(f"patch_size is {patch_size}, but must be one of {', '.join(map(str, PATCH_SIZES))}.")
    if image_size is not None and image_size % patch_size:
        raise ValueError(
            f"image_size is {image_size}, which patches of {patch_size}x{patch_size} do not tile. Use a smaller "
            "patch_size, or resize the images to a multiple of it."
        )
    if dim % 8 or dim % heads:
        raise ValueError(f"dim is {dim}, but must be a multiple of 8 (patch splitting) and of heads={heads}.")

    body: list[nn.Module] = _patch_splitting(dim, patch_size, neuron, statistics)
    for _ in range(depth):
        attention = SelfAttention(dim, heads, scale, neuron, attention_neuron or neuron, statistics)
        perceptron = _perceptron(dim, mlp_ratio * dim, neuron, statistics)
        body += [Residual(attention, Chain()), Residual(perceptron, Chain())]
    body.append(TimeFolded(nn.AdaptiveAvgPool1d(1)))
    encoder = conv_norm(in_channels, dim // 8, statistics=statistics)
    return Network(encoder, Chain(*body), Readout(dim, num_classes), image_size=image_size)


def _patch_splitting(dim: int, patch_size: int, neuron: NeuronFactory, statistics: Statistics) -> list[nn.Module]:
    """From the current of the first convolution, `[T, B, D/8, H, W]`, to tokens with position, `[T, B, D, N]`."""
    widths = (dim // 8, dim // 4, dim // 2, dim)
    unpooled = len(widths) - PATCH_SIZES.index(patch_size)
    layers: list[nn.Module] = []
    for stage, width in enumerate(widths):
        if stage > 0:
            layers.append(conv_norm(widths[stage - 1], width, statistics=statistics))
        layers.append(activation(neuron, width))
        if stage >= unpooled:
            layers.append(TimeFolded(nn.MaxPool2d(3, stride=2, padding=1)))
    position = Chain(conv_norm(dim, dim, statistics=statistics), activation(neuron, dim))
    return [*layers, Residual(position, Chain()), TimeFolded(nn.Flatten(2))]


def _perceptron(dim: int, hidden: int, neuron: NeuronFactory, statistics: Statistics) -> Chain:
    """Two linear layers, each with its neuron, on every token of `[T, B, D, N]`."""
    return Chain(
        _linear_norm(dim, hidden, statistics),
        activation(neuron, hidden),
        _linear_norm(hidden, dim, statistics),
        activation(neuron, dim),
    )


class SelfAttention(Block):
    """Self-attention of spikes, `[T, B, D, N]` to `[T, B, D, N]`: no softmax, since spikes are not negative.

        q, k, v = neuron(BN(W x))                             each [T, B, heads, D / heads, N]
        y = neuron(BN(W' attention_neuron(scale v k^T q) + b'))

    Args:
        dim: D.
        heads: Number of heads; divides D.
        scale: Factor on the product.
        neuron: Activation of q, k, v (one of 3 D channels) and of the output.
        attention_neuron: Activation of the product.
        statistics: As in `BatchNorm`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        scale: float,
        neuron: NeuronFactory,
        attention_neuron: NeuronFactory,
        statistics: Statistics,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.split = Chain(_linear_norm(dim, 3 * dim, statistics, bias=False), activation(neuron, 3 * dim))
        self.attend = AttentionProduct(scale)
        self.fire = activation(attention_neuron, dim)
        self.merge = Chain(_linear_norm(dim, dim, statistics), activation(neuron, dim))

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Let every token of `[T, B, D, N]` gather from all tokens of its time step."""
        q, k, v = self.split(x, carry).unflatten(2, (3, self.heads, -1)).unbind(2)
        current = self.attend(q, k, v).flatten(2, 3)
        return self.merge(self.fire(current, carry), carry)


class AttentionProduct(nn.Module):
    """`y = scale v k^T q`, multiplied in the order that costs less.

    Without a softmax the product is associative: `(v k^T) q` costs d^2 N and `v (k^T q)` costs d N^2. For spikes, all
    partial sums are integers, so that in float32 both orders give the same result exactly (up to 2^24, and a power of
    two as `scale`); with bursts or in bfloat16 they agree up to rounding. A module, so that hooks can count its work.

    >>> import torch
    >>> q, k, v = torch.ones(3, 4, 6)  # d = 4 features of N = 6 tokens
    >>> AttentionProduct(scale=0.125)(q, k, v)[0].tolist()
    [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map queries, keys and values `[..., d, N]` to `[..., d, N]`."""
        features, tokens = q.shape[-2:]
        k = k.transpose(-1, -2)
        return self.scale * ((v @ k) @ q if tokens > features else v @ (k @ q))

    def extra_repr(self) -> str:
        """Settings, as printed."""
        return f"scale={self.scale}"


def _linear_norm(in_features: int, out_features: int, statistics: Statistics, *, bias: bool = True) -> nn.Sequential:
    """The same linear map on every token, then batch normalisation, on `[T, B, D, N]`."""
    linear = nn.Conv1d(in_features, out_features, kernel_size=1, bias=bias)
    nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(TimeFolded(linear), BatchNorm(out_features, statistics=statistics))
