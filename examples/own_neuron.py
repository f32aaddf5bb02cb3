"""A neuron of your own: one pure function of one time step. It compiles, streams and trains like the built-in ones.

python examples/own_neuron.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import ranvier as rv
from ranvier.dynamics import NeuronState, Triangle, spike


@dataclass(frozen=True)
class LeakyWithFloorParams:
    """Numbers of the neuron."""

    tau: float = 2.0
    v_threshold: float = 0.5
    floor: float = -0.5


def leaky_with_floor_step(x: Tensor, v: Tensor, params: LeakyWithFloorParams) -> tuple[Tensor, Tensor]:
    """One step: LIF charge, a potential that cannot fall below a floor, soft reset."""
    h = torch.clamp(v + (x - v) / params.tau, min=params.floor)
    s = spike(h - params.v_threshold, Triangle())
    return s, h - params.v_threshold * s.detach()


class LeakyWithFloor(rv.nn.Neuron):
    """The function as an activation."""

    def __init__(self, num_channels: int | None = None) -> None:
        super().__init__("auto", num_channels)
        self.params = LeakyWithFloorParams()  # type: ignore[assignment]

    def scan(self, current: Tensor, state: NeuronState | None) -> tuple[Tensor, NeuronState]:
        """All steps, through the shared scan."""
        return rv.kernels.scan(leaky_with_floor_step, current, state, self.params, implementation=self.implementation)


def main() -> None:
    """Train it on the digits for a moment, then run it step by step."""
    torch.manual_seed(0)
    splits = rv.data.load_digits()
    batches = rv.data.Batches(splits.train, 64, shuffle=True)
    model = rv.models.mlp([64, 128, 10], neuron=LeakyWithFloor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for epoch in range(4):
        for images, labels in batches.epoch(epoch):
            logits = model(images, steps=4)
            loss = rv.losses.cross_entropy(logits, labels) + rv.losses.temporal_consistency(logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(rv.evaluation.accuracy_by_step(model, rv.data.Batches(splits.test, 200), steps=4))

    images, _ = next(iter(rv.data.Batches(splits.test, 1)))
    state = None
    with torch.no_grad():
        for step in range(4):
            logits, state = model(images, steps=1, state=state, return_state=True)
            print(f"step {step + 1}: class {int(logits.argmax())}")


if __name__ == "__main__":
    main()
