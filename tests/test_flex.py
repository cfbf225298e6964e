"""What flex says that it cannot do."""

import pytest
import torch

from attn_impls import Unsupported, Workload
from attn_impls.registry import discover


def test_flex_says_what_its_kernel_has_no_room_for(monkeypatch):
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    with pytest.raises(Unsupported, match="shared memory"):
        discover()["flex"](Workload.parse("b1-h1-q1kv64-d576v512-bf16"))


NONE_FITS = "NoValidChoicesError: No choices to select. Provided reason: No choices exist for backend."
TOO_MUCH = "No valid triton configs. OutOfMemoryError: out of resource: triton_tem Required: 344320 Hardware limit:232448"


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        (NONE_FITS, Unsupported),
        (TOO_MUCH, Unsupported),
        ("No valid triton configs. CompilationError: at 7:11", RuntimeError),
        ("NoValidChoicesError: All choices failed to compile", RuntimeError),
        ("a bug", RuntimeError),
    ],
)
def test_what_only_the_compiler_knows_is_told_apart_from_a_failure(monkeypatch, said, raised):
    def compiled(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))  # needs no C++ compiler
    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)
    kernel = discover()["flex"](Workload.parse("b1-h1-s16-d16-fp32"))
    with pytest.raises(raised):
        kernel(None, None, None)
