"""Torch's global settings: what an implementation leaves changed is said, and set back for those who come after it."""

import pytest
import torch

from attn_impls import Workload
from attn_impls.harness import settings
from attn_impls.harness.case import Case, CaseFailed, guard
from attn_impls.registry import Implementation

CASE = Case(Workload.parse("b1-h2-s8-d8-fp32"), Implementation("mine", lambda _: None), "cpu")
CHANGES = {
    "whether gradients are recorded (True → False)": lambda: torch.set_grad_enabled(False),
    "the default dtype (torch.float32 → torch.bfloat16)": lambda: torch.set_default_dtype(torch.bfloat16),
    "the precision of float32 matmuls (highest → medium)": lambda: torch.set_float32_matmul_precision("medium"),
    "the deterministic mode (0 → 2)": lambda: torch.use_deterministic_algorithms(True),
    "the deterministic mode (0 → 1)": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "the default device (cpu → meta)": lambda: torch.set_default_device("meta"),
    "whether autograd looks for anomalies (False → True)": lambda: torch.autograd.set_detect_anomaly(True),
    "autocast on GPUs (False → True)": lambda: torch.set_autocast_enabled("cuda", True),
    "autocast on CPUs (False → True)": lambda: torch.set_autocast_enabled("cpu", True),
    "the number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "the seed of random numbers": lambda: torch.manual_seed(torch.initial_seed() + 1),
    "SDPA's flash backend (True → False)": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "SDPA's memory-efficient backend (True → False)": lambda: torch.backends.cuda.enable_mem_efficient_sdp(False),
    "SDPA's math backend (True → False)": lambda: torch.backends.cuda.enable_math_sdp(False),
    "SDPA's cuDNN backend (True → False)": lambda: torch.backends.cuda.enable_cudnn_sdp(False),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("raises", [False, True])
def test_a_change_is_told_and_undone(what, raises):
    before = settings.current()

    def run():
        CHANGES[what]()
        if raises:
            raise OSError("boom")

    with pytest.raises(CaseFailed) as caught, guard(CASE, "kernel"):
        run()
    said = str(caught.value)
    assert said.startswith("mine raised in its kernel: OSError: boom" if raises else f"mine changed {what}")
    assert raises or said.endswith(" for everybody in its kernel: set it back there")
    assert settings.current() == before


def test_a_change_that_is_set_back_is_nobodys_business():
    before = settings.current()
    with guard(CASE, "kernel"), torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        inside = settings.current()
    assert inside != before == settings.current()


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="of torch 2.9 and newer")
@pytest.mark.parametrize("of", ["", "cuda.matmul", "mkldnn", "mkldnn.matmul"])
def test_the_newer_way_to_set_a_precision_is_seen_too(of):
    before, backend = settings.current(), torch.backends
    for name in filter(None, of.split(".")):
        backend = getattr(backend, name)
    with pytest.raises(CaseFailed, match=r"changed the precision of float32 matmuls \(highest → "), guard(CASE, "builder"):
        backend.fp32_precision = "tf32"
    assert settings.current() == before
    with guard(CASE, "builder"):
        assert settings.current() == before
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_broken_device_hides_no_failure(monkeypatch):
    readings = iter([7])

    def read():
        for reading in readings:
            return reading
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    only = {"the current CUDA device": settings.Setting(settings._on_cuda(read), pytest.fail)}
    monkeypatch.setattr(settings, "SETTINGS", only)
    with pytest.raises(CaseFailed, match="mine raised in its kernel: OSError: first"), guard(CASE, "kernel"):
        raise OSError("first")
