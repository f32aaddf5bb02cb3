"""A process killed with SIGKILL at random moments, and resumed, ends with the weights of one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ranvier.training import CHECKPOINT, read_progress
from ranvier.weights import load_tensors

KILLS = 10
TRAIN = (
    *(sys.executable, "-m", "ranvier", "train", "digits", "--model", "conv4", "--epochs", "3", "--seed", "3"),
    *("--neuron", "lifb", "--checkpoint-seconds", "0", "--device", "cpu", "--resume", "--out"),
)


def run_to_the_end(out: Path) -> None:
    subprocess.run([*TRAIN, str(out)], check=True, capture_output=True, timeout=120)


def stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.slow
def test_kill_and_resume_is_bit_identical(tmp_path: Path) -> None:
    run_to_the_end(tmp_path / "calm")
    calm, _ = load_tensors(tmp_path / "calm" / "model.safetensors")

    out = tmp_path / "killed"
    checkpoint = out / CHECKPOINT
    moments = random.Random(0)
    positions = []
    while len(positions) < KILLS:
        before = stamp(checkpoint)
        process = subprocess.Popen([*TRAIN, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while stamp(checkpoint) == before and process.poll() is None:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.06))  # a few updates: some kills hit the writing of the next checkpoint
        finally:
            os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed ten times"
        positions.append(read_progress(checkpoint).step)
    assert len(set(positions)) == KILLS, "every attempt made progress"
    assert positions == sorted(positions)

    run_to_the_end(out)
    killed, _ = load_tensors(out / "model.safetensors")
    assert calm.keys() == killed.keys()
    for name, value in calm.items():
        assert torch.equal(value, killed[name]), name

    def history(folder: str) -> list[dict]:
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if "seconds" not in key} for line in lines]

    assert history("killed") == history("calm")
