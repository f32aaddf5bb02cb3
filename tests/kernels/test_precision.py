import pytest
import torch

from ranvier.kernels import choose_precision, precision


def test_what_is_asked_for_is_taken() -> None:
    assert choose_precision("bfloat16", "cpu") == precision.PrecisionChoice("bfloat16", "asked for")
    assert choose_precision("float32", torch.device("cuda")).precision == "float32"
    with pytest.raises(ValueError, match="half"):
        choose_precision("half", "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(("has", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_bfloat16_where_there_are_instructions_for_it(
    has: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: has)
    assert choose_precision("auto", "cpu").precision == expected
    assert "this processor" in choose_precision("auto", "cpu").reason
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has and not including_emulation)
    assert choose_precision("auto", "cuda").precision == expected
    assert "this GPU" in choose_precision("auto", "cuda:0").reason
    assert choose_precision("auto", "meta").precision == "float32"


@pytest.mark.parametrize(
    ("capability", "multiplies", "takes", "expected"),
    [
        ("AVX512", True, True, True),
        ("AVX512", False, True, False),  # oneDNN takes it, by way of float32
        ("AVX2", False, False, False),
        ("DEFAULT", False, True, True),  # other processors than x86
        ("DEFAULT", False, False, False),
    ],
)
def test_which_processors_have_instructions(
    capability: str, multiplies: bool, takes: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: takes)
    assert precision._cpu_has_bfloat16() is expected
