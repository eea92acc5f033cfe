import torch

from memory.model.device import has_fast_bfloat16, resolve_device


def test_a_device_is_taken_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_device_without_instructions_for_bfloat16_says_so() -> None:
    assert not has_fast_bfloat16(torch.device("meta"))
    able = torch.cpu.get_capabilities()
    wanted = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    assert has_fast_bfloat16(torch.device("cpu")) == wanted
