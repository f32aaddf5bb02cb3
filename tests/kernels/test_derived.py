import copy
import pickle

import torch
from torch import Tensor, nn

from ranvier.kernels.derived import Derived


def test_made_once_and_again_after_a_change() -> None:
    made: list[Tensor] = []
    weight, packed = torch.ones(3), Derived[Tensor]()

    def of(tensor: Tensor) -> Tensor:
        def pack() -> Tensor:
            made.append(tensor)
            return 2 * tensor

        return packed((tensor,), pack)

    assert of(weight).tolist() == of(weight).tolist() == [2, 2, 2]
    assert len(made) == 1
    weight += 1
    assert of(weight).tolist() == [4, 4, 4]
    other = torch.zeros(3)
    assert of(other).tolist() == [0, 0, 0]
    assert of(other.double()).dtype == torch.float64
    assert len(made) == 4


def test_a_weight_that_was_replaced_twice() -> None:
    """The second may lie where the one that was packed lay, which only what holds that one can prevent."""
    layer, packed = nn.Linear(64, 64, bias=False), Derived[Tensor]()
    for number in range(50):
        for value in (-1.0, float(number)):
            layer.load_state_dict({"weight": torch.full((64, 64), value)}, assign=True)
        assert packed((layer.weight,), lambda: layer.weight.detach().clone())[0, 0] == number


def test_weights_of_inference_mode_and_copies() -> None:
    with torch.inference_mode():
        weight = torch.ones(3)
    packed = Derived[Tensor]()
    assert packed((weight,), lambda: weight + 1).tolist() == [2, 2, 2]
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):  # bytes made right here
        assert other((weight,), lambda: weight + 2).tolist() == [3, 3, 3]
