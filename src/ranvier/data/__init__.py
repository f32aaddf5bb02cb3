"""What comes in: images, the bundled digits, augmentation and batches; images as simulated event recordings."""

from ranvier.data import events
from ranvier.data.augment import Augmentation, Normalization
from ranvier.data.batches import Batches, evaluation_batch_size
from ranvier.data.digits import load_digits
from ranvier.data.images import ImageSet, ImageSplits, StreamedImages
from ranvier.data.loading import load_images
from ranvier.data.saccades import SaccadeSettings, SimulatedRecordings, simulate, simulated_events

__all__ = [
    "Augmentation",
    "Batches",
    "ImageSet",
    "ImageSplits",
    "Normalization",
    "SaccadeSettings",
    "SimulatedRecordings",
    "StreamedImages",
    "evaluation_batch_size",
    "events",
    "load_digits",
    "load_images",
    "simulate",
    "simulated_events",
]
