"""Event cameras: recordings, readers of their files, frames, and sets of frames for training."""

from ranvier.data.events.aedat2 import read_cifar10_dvs
from ranvier.data.events.aedat3 import GestureTrial, read_dvs_gesture, read_gesture_labels
from ranvier.data.events.atis import read_ncaltech101, read_nmnist
from ranvier.data.events.event_mix import EventMix, mix_frames
from ranvier.data.events.files import FileRecordings, Trial
from ranvier.data.events.frame_augment import FrameAugmentation
from ranvier.data.events.frame_set import FrameSet, FrameSplits
from ranvier.data.events.frame_store import build_frames, build_splits
from ranvier.data.events.frames import FrameSettings, to_frames, voxel_grid
from ranvier.data.events.prophesee import read_prophesee
from ranvier.data.events.recording import (
    BRIGHTER,
    DARKER,
    EVENT,
    RecordingError,
    Recordings,
    RecordingSplits,
    check_events,
    make_events,
)
from ranvier.data.events.sheets import SHEETS, EventSheet, load_recordings
from ranvier.data.events.transforms import (
    drop_area,
    drop_events,
    drop_interval,
    event_drop,
    flip_events,
    jitter_times,
    shift_events,
)

__all__ = [
    "BRIGHTER",
    "DARKER",
    "EVENT",
    "SHEETS",
    "EventMix",
    "EventSheet",
    "FileRecordings",
    "FrameAugmentation",
    "FrameSet",
    "FrameSettings",
    "FrameSplits",
    "GestureTrial",
    "RecordingError",
    "RecordingSplits",
    "Recordings",
    "Trial",
    "build_frames",
    "build_splits",
    "check_events",
    "drop_area",
    "drop_events",
    "drop_interval",
    "event_drop",
    "flip_events",
    "jitter_times",
    "load_recordings",
    "make_events",
    "mix_frames",
    "read_cifar10_dvs",
    "read_dvs_gesture",
    "read_gesture_labels",
    "read_ncaltech101",
    "read_nmnist",
    "read_prophesee",
    "shift_events",
    "to_frames",
    "voxel_grid",
]
