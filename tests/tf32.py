"""float32 attention as tensor cores compute it, emulated in float64: each product is three of TF32 parts, or one ("TF32").

After CUTLASS's OpMultiplyAddFastF32 (examples/27_ampere_3xtf32_fast_accurate_tensorop_gemm) and Ootomo & Yokota, "Recovering
single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", arXiv 2203.03341.
"""

import math

import torch
from torch import Tensor

from attn_impls import Workload

STEP, STAGE = 8, 4  # products that one instruction adds up, and instructions before CUTLASS takes their sum out
GUARD = 2  # bits below a float32's last that addends keep: what an H100's errors fit


def kept(x: Tensor, bits: int, nearest: bool = False) -> Tensor:
    """A float64 truncated toward zero, to so many bits after the leading one, or rounded."""
    half = 1 << (51 - bits) if nearest else 0
    return ((x.contiguous().view(torch.int64) + half) & -(1 << (52 - bits))).view(torch.float64)


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Big and small, of 10 bits each, as CUTLASS rounds them."""
    big = kept(x.double(), 10)
    return big, kept(x.double() - big, 10, nearest=True)


def instruction(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b for [..., M, 8] and [..., 8, N]: addends are cut off at the largest one's last place, and their sum again."""
    addends = torch.cat([total[..., None, :], a[..., None] * b[..., None, :, :]], -2)  # [..., M, 9, N]
    largest = addends.abs().amax(-2, keepdim=True)
    place = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 24 - GUARD)
    return kept(((addends / place).trunc() * place).sum(-2), 23)


def product(a: Tensor, b: Tensor, passes: int) -> Tensor:
    """a @ b, in float32."""
    (big_a, small_a), (big_b, small_b) = parts(a), parts(b)
    pairs = [(small_a, big_b), (big_a, small_b), (big_a, big_b)][-passes:]
    sums = torch.zeros(*a.shape[:-1], b.shape[-1])
    stage = sums.double()
    for n, first in enumerate(range(0, a.shape[-1], STEP)):
        for x, y in pairs:
            stage = instruction(stage, x[..., first : first + STEP], y[..., first : first + STEP, :])
        if n % STAGE == 0:  # as its main loop has it: after steps 1, 5, 9, …
            sums, stage = sums + stage.float(), torch.zeros_like(stage)
    return sums + stage.float()


def attend(w: Workload, q: Tensor, k: Tensor, v: Tensor, passes: int = 3) -> Tensor:
    """Attention without a softcap; all but the products is plain float32."""
    k, v = (t.repeat_interleave(w.group, 1) for t in (k, v))
    scores, mask = product(q, k.mT, passes) * w.scale, w.mask("cpu")
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=-1e30))  # of a row that sees nothing, 0
    return product(weights, v, passes) / weights.sum(-1, keepdim=True).clamp(min=1e-30)
