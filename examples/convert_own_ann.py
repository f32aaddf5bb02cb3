"""Train an ordinary PyTorch network on the digits, convert it, and look at what was lost where.

python examples/convert_own_ann.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ranvier as rv


class Ann(nn.Module):
    """A small residual network, written as one writes it: functions, an in-place ReLU, max-pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K]."""
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.conv2(F.relu(self.conv1(x))) + x)
        return self.head(torch.flatten(F.max_pool2d(x, 2), 1))


def main() -> None:
    """Train, convert, evaluate."""
    torch.manual_seed(0)
    splits = rv.data.load_digits()
    train = rv.data.Batches(splits.train, 64, shuffle=True, seed=0)
    test = rv.data.Batches(splits.test, 300)
    ann = Ann()
    optimizer = torch.optim.Adam(ann.parameters(), 2e-3)
    for epoch in range(5):
        for images, labels in train.epoch(epoch):
            loss = F.cross_entropy(ann(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ann.eval()
    hits = sum(int((ann(images).argmax(1) == labels).sum()) for images, labels in test)
    print(f"ANN: {hits / len(splits.test):.1%}")

    calibration = [images for images, _ in train.epoch(0)]  # no labels needed
    snn = rv.conversion.convert(ann, calibration, steps=8, threshold="mmse", bias="ftbc")
    print(f"SNN: {rv.evaluation.accuracy_by_step(snn, test, steps=8)}")
    print(snn.report)
    for layer in snn.report.layers:
        print(f"  {layer.name}: error at t=1 {layer.error_before[0]:.2f} -> {layer.error_after[0]:.2f}")


if __name__ == "__main__":
    main()
