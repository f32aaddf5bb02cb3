import hashlib
import sys

import pytest
import torch

from ranvier.data import load_digits


def test_shape_and_split() -> None:
    digits = load_digits()
    assert (len(digits.train), len(digits.test)) == (1197, 600)
    assert digits.train.shape == digits.test.shape == (1, 8, 8)
    assert digits.train.classes == tuple("0123456789")
    assert torch.bincount(digits.test.labels).tolist() == [59, 61, 59, 61, 61, 61, 60, 60, 58, 60]


def test_levels_are_sixteenths_of_255() -> None:
    levels = torch.cat([load_digits().train.images, load_digits().test.images]).unique().tolist()
    assert levels == [round(level * 255 / 16) for level in range(17)]


def test_split_never_changes() -> None:
    """Accuracies are comparable over versions only while these bytes stay what they are."""
    test = load_digits().test
    digest = hashlib.sha256(test.images.numpy().tobytes() + test.labels.numpy().tobytes()).hexdigest()
    assert digest[:16] == "7fa0f76f0d493518"


def test_missing_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_digits()
