"""Named workloads, each with its source, and the one rule that makes a CPU-sized workload of each."""

from __future__ import annotations

from .workload import Workload

# name: (id, where the numbers come from)
PRESETS: dict[str, tuple[str, str]] = {
    "seed": ("b1-h32-s8192-d128-bf16", "the comparison this project grew from: batch 1, seq 8192, embed 4096, 32 heads"),
    "seed-causal": ("b1-h32-s8192-d128-causal-bf16", "the same with a causal mask"),
    "llama3-8b-prefill": ("b1-h32kv8-s8192-d128-causal-bf16", "meta-llama/llama-models, Llama 3 8B: 32 heads, 8 KV heads"),
    "small": ("b8-h16-s512-d64-bf16", "launch-bound: short sequences, where host time decides"),
    "odd": ("b2-h6kv3-s1023-d64-causal-bf16", "no size a multiple of a tile, as in FlashAttention's tests"),
}

DEFAULT_PRESETS = ("seed", "seed-causal", "llama3-8b-prefill", "small", "odd")

CPU_RULE = "batch ≤ 2, heads ÷ 4 (or 2, where 4 does not divide heads and KV heads), lengths and window ÷ 16 (not below 32)"


def preset(name: str) -> Workload:
    """The workload of a preset's name, at full size. Raises KeyError."""
    return Workload.parse(PRESETS[name][0])


def cpu_sized(w: Workload) -> Workload:
    """`w` scaled down by CPU_RULE; head dims, mask kind and dtype stay."""
    divide = next(n for n in (4, 2, 1) if w.heads % n == 0 and w.kv_heads % n == 0)

    def shorter(length: int) -> int:
        return max(length // 16, min(length, 32))

    return w.replace(
        batch=min(w.batch, 2),
        heads=w.heads // divide,
        kv_heads=w.kv_heads // divide,
        q_len=shorter(w.q_len),
        kv_len=shorter(w.kv_len),
        window=shorter(w.window) if w.window else 0,
    )
