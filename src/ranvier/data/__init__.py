"""What comes in: images, the bundled digits, augmentation and batches."""

from ranvier.data.augment import Augmentation, Normalization
from ranvier.data.batches import Batches
from ranvier.data.digits import load_digits
from ranvier.data.images import ImageSet, ImageSplits, StreamedImages
from ranvier.data.loading import load_images

__all__ = [
    "Augmentation",
    "Batches",
    "ImageSet",
    "ImageSplits",
    "Normalization",
    "StreamedImages",
    "load_digits",
    "load_images",
]
