"""Networks as others write them, narrow and untrained, and by the ways of writing that differ among them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give all batch normalisations statistics and weights as after training, so that folding has something to fold."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            channels = module.num_features
            module.running_mean.copy_(torch.randn(channels, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(channels, generator=generator) * 0.3)
    return model


class BasicBlock(nn.Module):
    """As in torchvision: one in-place ReLU, used twice."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """As in torchvision, with max-pooling after the first activation."""

    def __init__(self, width: int = 8, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self.stage(width, width, 1)
        self.layer2 = self.stage(width, 2 * width, 2)
        self.layer3 = self.stage(2 * width, 4 * width, 2)
        self.layer4 = self.stage(4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, num_classes)

    @staticmethod
    def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class VGG16(nn.Module):
    """As in torchvision, with batch normalisation: one long Sequential, max-pooling, dropout."""

    def __init__(self, width: int = 8, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for entry in (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M"):
            if entry == "M":
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            else:
                layers += [
                    nn.Conv2d(channels, entry * width, 3, padding=1),
                    nn.BatchNorm2d(entry * width),
                    nn.ReLU(inplace=True),
                ]
                channels = entry * width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 4, 64),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(64, 64),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(64, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, linear projection; ReLU6."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.use_res_connect = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            self.conv_bn_relu(inputs, hidden, 1, 1, 1),
            self.conv_bn_relu(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    @staticmethod
    def conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(nn.Module):
    """As in torchvision, shortened: global average by `mean`."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            InvertedResidual.conv_bn_relu(3, 8, 3, 2, 1),
            InvertedResidual(8, 8, 1, 1),
            InvertedResidual(8, 12, 2, 6),
            InvertedResidual(12, 12, 1, 6),
            InvertedResidual.conv_bn_relu(12, 32, 1, 1, 1),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class DenseLayer(nn.Module):
    """Normalisation and activation come first, and what came is kept beside what is new."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = torch.cat(features, 1)
        x = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(x), inplace=True))


class DenseNet(nn.Module):
    """Two dense blocks with a transition between."""

    def __init__(self, growth: int = 4, num_classes: int = 10) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.block1 = nn.ModuleList(DenseLayer(8 + index * growth, growth) for index in range(3))
        width = 8 + 3 * growth
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width // 2, 1, bias=False)
        self.block2 = nn.ModuleList(DenseLayer(width // 2 + index * growth, growth) for index in range(2))
        self.norm5 = nn.BatchNorm2d(width // 2 + 2 * growth)
        self.classifier = nn.Linear(width // 2 + 2 * growth, num_classes)

    @staticmethod
    def run(block: nn.ModuleList, x: Tensor) -> Tensor:
        features = [x]
        for layer in block:
            features.append(layer(features))
        return torch.cat(features, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.block1, self.conv0(x))
        x = F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)
        x = F.relu(self.norm5(self.run(self.block2, x)), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """As in torchvision's ShuffleNetV2: half the channels pass, then the halves are shuffled."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = outputs // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                nn.Conv2d(inputs, branch, 1, bias=False),
                nn.BatchNorm2d(branch),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(inputs if stride > 1 else branch, branch, 1, bias=False),
            nn.BatchNorm2d(branch),
            nn.ReLU(inplace=True),
            nn.Conv2d(branch, branch, 3, stride, 1, groups=branch, bias=False),
            nn.BatchNorm2d(branch),
            nn.Conv2d(branch, branch, 1, bias=False),
            nn.BatchNorm2d(branch),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNet(nn.Module):
    """A stem with max-pooling and two units."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stage2 = nn.Sequential(ShuffleUnit(8, 16, 2), ShuffleUnit(16, 16, 1), ShuffleUnit(16, 16, 1))
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.maxpool(self.conv1(x)))
        return self.fc(x.mean([2, 3]))


class Inception(nn.Module):
    """Branches of one input, one of them pooled, joined and pooled."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))
        self.pooled = nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(14, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        branches = [self.left(x), self.right(x), self.pooled(F.max_pool2d(x, 3, stride=1, padding=1))]
        x = torch.cat([F.relu(branch) for branch in branches], 1)
        x = F.max_pool2d(x, 2)
        return self.fc(F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0])


class ResNet20A(nn.Module):
    """Shortcuts of option A: every second pixel, and zeros for the channels that are new."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        shortcut = F.pad(out[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)
        out = F.relu(self.bn2(self.conv2(out)) + shortcut)
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class Conv1dNet(nn.Module):
    """Signals `[B, 2, 32]`."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(2, 8, 5, padding="same"),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(8, 8, 3, dilation=2, padding=2, groups=2, padding_mode="reflect"),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Conv1d(8, 8, 3, padding="same", dilation=3),
            nn.ReLU6(),
            nn.Conv1d(8, 8, 1, padding="valid"),
            nn.AvgPool1d(2),
            nn.Dropout1d(0.1),
            nn.AdaptiveAvgPool1d(1),
        )
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).squeeze(-1))


class FunctionalMLP(nn.Module):
    """Functions on parameters, with a factor and a shift, on images `[B, 1, 8, 8]`."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(32, 64) / 8)
        self.b1 = nn.Parameter(torch.randn(32))
        self.w2 = nn.Parameter(torch.randn(32, 24) / 6)
        self.w3 = nn.Parameter(torch.randn(24, num_classes) / 5)
        self.gain = nn.Parameter(torch.rand(24) + 0.5)
        self.register_buffer("mean", torch.rand(24))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.rand(24))
        self.register_buffer("running_var", torch.rand(24) + 0.5)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = 2 * (x.reshape(-1, 64) - 0.5)
        x = F.linear(x, self.w1, self.b1).relu()
        x = F.batch_norm(x @ self.w2, self.running_mean, self.running_var)
        features = torch.clamp((x - self.mean) * self.gain, min=0, max=3.0)
        logits = torch.matmul(features.clamp_min(0), self.w3) / 2
        if return_features:
            return logits, features
        return logits


class SharedWeights(nn.Module):
    """The same layer, normalisation and activation three times over."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.enter(x))
        for _ in range(3):
            x = self.act(self.norm(self.conv(x)) + x)
        return self.head(x.mean(dim=(-2, -1)))


class Rearranging(nn.Module):
    """Shapes in many ways of writing, on images `[B, 3, 8, 8]`."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 8, 3, padding=1)
        self.mix = nn.Linear(8, 8)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.shuffle = nn.ChannelShuffle(2)
        self.pad = nn.ZeroPad2d((1, 0, 1, 0))
        self.unflatten = nn.Unflatten(1, (2, 4))
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, 2)
        x = self.up(F.relu(self.conv(x)))
        x = self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = torch.relu_(self.shuffle(x))
        x = F.max_pool2d(self.pad(x), 3)
        left, right = x.split([3, 5], 1)
        x = torch.stack([left[:, 0], right.select(1, -1), right.narrow(1, 1, 1).squeeze(1), left[:, 2:, ...][:, 0]], -3)
        x = x.unsqueeze(1).transpose(1, 2).flatten(1)
        x = F.interpolate(x[:, None], size=32)[:, 0]
        a, b = self.unflatten(F.pixel_shuffle(x.view(-1, 8, 2, 2), 2).flatten(2).mT.reshape(len(x), 8, -1)).unbind(1)
        x = torch.add(a, b, alpha=-0.5).detach().clone().float()
        return self.head(-x.movedim(2, 1).reshape(x.shape[0], -1).expand(-1, 16))


class LeNet(nn.Module):
    """In-place methods and functions, and max-pooling before the activation."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 32)
        self.fc2 = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), (2, 2)), inplace=True)
        x = F.max_pool2d(self.conv2(x).relu_(), 2)
        x = F.dropout(x, training=self.training)
        x = F.hardtanh(self.fc1(x.view(-1, self.num_flat_features(x))), 0.0, 4.0)
        return self.fc2(x)

    @staticmethod
    def num_flat_features(x: Tensor) -> int:
        count = 1
        for size in x.size()[1:]:
            count *= size
        return count


ARCHITECTURES: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "resnet18": (ResNet18, (3, 32, 32)),
    "vgg16": (VGG16, (3, 32, 32)),
    "mobilenet_v2": (MobileNetV2, (3, 16, 16)),
    "densenet": (DenseNet, (3, 8, 8)),
    "shufflenet": (ShuffleNet, (3, 32, 32)),
    "inception": (Inception, (3, 8, 8)),
    "resnet20_option_a": (ResNet20A, (3, 8, 8)),
    "conv1d": (Conv1dNet, (2, 32)),
    "functional_mlp": (FunctionalMLP, (1, 8, 8)),
    "shared_weights": (SharedWeights, (3, 8, 8)),
    "rearranging": (Rearranging, (3, 8, 8)),
    "lenet": (LeNet, (3, 32, 32)),
}
"""Class and image shape by name."""


def build(name: str) -> tuple[nn.Module, Tensor]:
    """An architecture with random weights and statistics, in training mode, and five images."""
    kind, shape = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = with_statistics(kind())
    return model, torch.randn(5, *shape)
