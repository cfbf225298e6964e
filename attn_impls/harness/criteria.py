"""The correctness criteria of other projects, as functions, to be run on the same mutants as ours.

Each takes an output, the right answer in float64, and `plain`, the same attention written plainly in the workload's dtype;
all [B, H, Sq, DV]. True is a pass. Their inputs are standard normal, as those projects' tests have them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Criterion = Callable[[Tensor, Tensor, Tensor], bool]


def worst(out: Tensor, right: Tensor) -> float:
    """The largest absolute difference; infinity for NaN."""
    error = (out.double() - right.double()).abs().max()
    return float(error) if bool(error.isfinite()) else float("inf")


def close(out: Tensor, right: Tensor, atol: float, rtol: float) -> bool:
    return torch.allclose(out.double(), right.to(out.dtype).double(), rtol=rtol, atol=atol)


def flash_attention(out: Tensor, right: Tensor, plain: Tensor) -> bool:
    """At most twice the plain run's error, and what adding and taking away 0.3 costs. Dao-AILab/flash-attention, tests."""
    right32 = right.float()
    slack = 2 * worst((right32.to(out.dtype) + 0.3 - 0.3), right32.to(out.dtype))
    return worst(out, right32) <= 2 * worst(plain, right32) + slack


def flashinfer(out: Tensor, right: Tensor, plain: Tensor) -> bool:  # noqa: ARG001
    """flashinfer-ai/flashinfer: atol 1e-2, rtol 0.2."""
    return close(out, right, 1e-2, 0.2)


def tritonbench(out: Tensor, right: Tensor, plain: Tensor) -> bool:  # noqa: ARG001
    """meta-pytorch/tritonbench, bf16: atol 2e-2, rtol 1e-2."""
    return close(out, right, 2e-2, 1e-2)


XFORMERS = {torch.float32: (3e-4, 2e-5), torch.float16: (4e-3, 4e-4), torch.bfloat16: (2e-2, 5e-3)}


def xformers(out: Tensor, right: Tensor, plain: Tensor) -> bool:  # noqa: ARG001
    """facebookresearch/xformers, memory-efficient attention: atol and rtol by dtype."""
    return close(out, right, *XFORMERS[out.dtype])


def cudnn_frontend(out: Tensor, right: Tensor, plain: Tensor) -> bool:  # noqa: ARG001
    """NVIDIA/cudnn-frontend: atol and rtol 1e-2."""
    return close(out, right, 1e-2, 1e-2)


def aiter(out: Tensor, right: Tensor, plain: Tensor) -> bool:
    """ROCm/aiter: at most twice the plain run's largest error, or 0.01."""
    return worst(out, right) <= max(2 * worst(plain, right), 0.01)


CRITERIA: dict[str, Criterion] = {
    "FA 2× rule": flash_attention,
    "FlashInfer": flashinfer,
    "tritonbench": tritonbench,
    "xFormers": xformers,
    "cuDNN FE": cudnn_frontend,
    "aiter": aiter,
}
