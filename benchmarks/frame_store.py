"""How long it takes to simulate and cut recordings into frames, to open them again, and to read batches of them.

    python benchmarks/frame_store.py --data FOLDER_OR_HUB_ID --count 10000
    python benchmarks/frame_store.py --data FOLDER_OR_HUB_ID --sensor 48 --amplitude 8 --model vggsnn

Reading is compared with the training step that it feeds: the share of an epoch that a process waits for its batches.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ranvier import models, provenance
from ranvier.data import Batches, ImageSet, SaccadeSettings, SimulatedRecordings, load_images
from ranvier.data.events import FrameAugmentation, FrameSettings, build_frames
from ranvier.kernels import compile_whole
from ranvier.training import DirectLoss, autocast, lay_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images for the simulated camera: folder or hub id")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--sensor", type=int, default=None)
    parser.add_argument("--amplitude", type=float, default=6.0)
    parser.add_argument("--surround", choices=("black", "edge"), default="black")
    parser.add_argument("--model", choices=("conv4", "vggsnn"), default="conv4")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=8)
    arguments = parser.parse_args()
    images = load_images(arguments.data).train
    assert isinstance(images, ImageSet)
    settings = SaccadeSettings(sensor=arguments.sensor, amplitude=arguments.amplitude, surround=arguments.surround)
    recordings = SimulatedRecordings(images.first(arguments.count), settings, seed=0)
    with tempfile.TemporaryDirectory() as cache:
        seconds = []
        for _ in range(2):  # built, then opened
            began = time.perf_counter()
            frames = build_frames(recordings, FrameSettings(10), cache_dir=Path(cache))
            seconds.append(time.perf_counter() - began)
        augment = FrameAugmentation(crop_padding=4, flip=True)
        batches = Batches(frames, arguments.batch_size, augment=augment, shuffle=True, drop_last=True)
        step = training_step(arguments.model, frames.shape, frames.num_classes)
        waits, works = [], []
        began = time.perf_counter()
        for number, (x, y) in zip(range(arguments.batches + 2), batches, strict=False):
            waited = time.perf_counter() - began
            began = time.perf_counter()
            step(x, y)
            worked = time.perf_counter() - began
            if number >= 2:  # the first ones compile
                waits.append(waited)
                works.append(worked)
            began = time.perf_counter()
        wait, work = statistics.median(waits), statistics.median(works)
        size = frames.num_bytes / 1e6
    print(f"| {len(frames)} simulated recordings of {'x'.join(map(str, recordings.sensor_size))} | |")
    print("|---|---|")
    print(f"| simulated and cut into ten frames | {seconds[0]:.1f} s |")
    print(f"| opened again (images checked) | {seconds[1]:.2f} s |")
    print(f"| size | {size:.0f} MB |")
    print(f"| a batch of {arguments.batch_size}, shuffled, crop and flip | {1000 * wait:.1f} ms |")
    print(f"| a training step of {arguments.model} on it | {1000 * work:.0f} ms |")
    print(f"| share of the time that reading takes | {100 * wait / (wait + work):.1f} % |")
    print(f"\n{provenance.device_name('cpu')}; {provenance.versions()}")


def training_step(name: str, shape: tuple[int, int, int], num_classes: int):
    channels, size, _ = shape
    model = lay_out(getattr(models, name)(num_classes, channels, image_size=size))
    compiled, loss = compile_whole(model), DirectLoss("etc")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        with autocast(torch.device("cpu"), "bfloat16"):
            value, _ = loss(compiled, x, y, None)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
