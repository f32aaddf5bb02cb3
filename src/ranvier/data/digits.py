"""The handwritten digits that come with scikit-learn: real data without a download."""

from __future__ import annotations

import torch

from ranvier.data.images import ImageSet, ImageSplits

_SPLIT_SEED = 0  # of the published split; another value would be another data set
_NUM_TEST = 600


def load_digits() -> ImageSplits:
    """Optical recognition of handwritten digits, as bundled with scikit-learn.

    ======== =============================================================================================
    images   8x8 pixels, one channel; counts of inked pixels 0..16 in 4x4 blocks, scaled to 0..255
    classes  10, the digits 0..9
    size     1,797: 1,197 for training, 600 for testing
    split    stratified by class, `hold_out(600, seed=0)` in scikit-learn's order. scikit-learn has only the test part
             of the original (13 other writers), so our two parts share writers and accuracies are not comparable
             with those published for the original split
    source   https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits
    licence  CC BY 4.0
    cite     E. Alpaydin and C. Kaynak (1998). Optical Recognition of Handwritten Digits. UCI Machine Learning
             Repository. https://doi.org/10.24432/C50P49
    ======== =============================================================================================

    Returns:
        The two splits: images uint8 `[N, 1, 8, 8]`, labels int64 `[N]`.

    Raises:
        ImportError: scikit-learn is not installed.

    >>> digits = load_digits()
    >>> len(digits.train), len(digits.test), digits.train.shape
    (1197, 600, (1, 8, 8))
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn. Install it with: pip install scikit-learn") from error
    bundled = datasets.load_digits()
    images = torch.from_numpy(bundled.images * (255 / 16)).round().to(torch.uint8)
    classes = tuple(str(digit) for digit in range(10))
    whole = ImageSet(images.unsqueeze(1), torch.from_numpy(bundled.target).long(), classes, "digits")
    return ImageSplits(*whole.hold_out(_NUM_TEST, seed=_SPLIT_SEED))
