"""Event cameras: recordings, readers of their files, frames, and sets of frames for training."""

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

__all__ = [
    "BRIGHTER",
    "DARKER",
    "EVENT",
    "RecordingError",
    "RecordingSplits",
    "Recordings",
    "check_events",
    "make_events",
]
