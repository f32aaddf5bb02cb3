"""From a burst network to hardware: train, decouple, write NIR, count energy, stop early.

python examples/to_hardware.py
"""

import tempfile
from pathlib import Path

import torch

import ranvier as rv
from ranvier.data import Batches, load_digits


def main() -> None:
    """Train, decouple, export, count, stop early."""
    splits = load_digits()
    train, choosing = splits.train.hold_out(200, seed=0)
    mean, std = train.statistics()
    form = rv.data.Normalization(tuple(mean), tuple(std))
    batches = Batches(train, 64, shuffle=True, drop_last=True, normalization=form)
    held_out, test = Batches(choosing, 200, normalization=form), Batches(splits.test, 200, normalization=form)

    torch.manual_seed(0)
    model = rv.models.mlp([64, 128, 64, 10], neuron=rv.nn.LIFB)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for epoch in range(5):
        for images, labels in batches.epoch(epoch):
            logits = model(images, steps=4)
            loss = rv.losses.cross_entropy(logits, labels) + rv.losses.temporal_consistency(logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(rv.evaluation.accuracy_by_step(model, test, 4))

    # Bursts become pairs of plain LIF neurons; their strengths move into the next weights.
    images, _ = next(iter(test))
    pair = rv.conversion.decouple(model, images, steps=4)
    print(pair.report.before, "->", pair.report.after)

    # A file for neuromorphic tools. The receipt says what the format cannot say, and what is the same.
    with tempfile.TemporaryDirectory() as folder:
        receipt = rv.export.to_nir(model, Path(folder) / "digits.nir", dt=1e-3, images=images, steps=4)
    print(f"NIR: {receipt.nodes}; largest spike mismatch {100 * receipt.largest_mismatch:.2f} %")

    # What an image costs, counted from actual spikes.
    energy = rv.evaluation.energy(model, test, 4)
    print(energy)

    # Most images need one step. The threshold is chosen on images that the network was not trained on.
    exits = rv.evaluation.early_exit(model, held_out, test, steps=4, max_loss=0.005, energy_by_step=energy.by_step)
    print(exits)


if __name__ == "__main__":
    main()
