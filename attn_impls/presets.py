"""Named workloads, each with its source, and the one rule that makes a CPU-sized workload of each."""

from __future__ import annotations

from .workload import Workload

# name: (id, where the numbers come from). S of a model is a typical one; heads, dims, windows and caps are its config's.
PRESETS: dict[str, tuple[str, str]] = {
    "seed": ("b1-h32-s8192-d128-bf16", "the comparison this project grew from: batch 1, seq 8192, embed 4096, 32 heads"),
    "seed-causal": ("b1-h32-s8192-d128-causal-bf16", "the same with a causal mask"),
    "seed-32k": ("b1-h32-s32768-d128-bf16", "its heads at a length where ranks have enough to do"),
    "seed-32k-causal": ("b1-h32-s32768-d128-causal-bf16", "the same with a causal mask"),
    "small": ("b8-h16-s512-d64-bf16", "launch-bound: short sequences, where host time decides"),
    "odd": ("b2-h6kv3-s1023-d64-causal-bf16", "no size a multiple of a tile, as in FlashAttention's tests"),
    # language models
    "gpt2": ("b8-h12-s1024-d64-causal-bf16", "openai-community/gpt2 config: n_head 12, n_embd 768, n_ctx 1024"),
    "llama3-8b-prefill": ("b1-h32kv8-s8192-d128-causal-bf16", "meta-llama/llama-models, Llama 3 8B: 32 heads, 8 KV heads"),
    "llama3-8b-decode": ("b64-h32kv8-q1kv8192-d128-causal-bf16", "the same, one token for each of 64 sequences"),
    "llama3-70b-prefill": ("b1-h64kv8-s8192-d128-causal-bf16", "meta-llama/llama-models, Llama 3 70B: 64 heads, 8 KV heads"),
    "llama3-70b-prefill-tp8": ("b1-h8kv1-s8192-d128-causal-bf16", "one rank of eight of it"),
    "llama3-405b-prefill": (
        "b1-h128kv8-s8192-d128-causal-bf16",
        "meta-llama/llama-models, Llama 3.1 405B: 128 heads, 8 KV heads",
    ),
    "llama3-405b-prefill-tp8": ("b1-h16kv1-s8192-d128-causal-bf16", "one rank of eight of it"),
    "qwen2.5-7b": ("b1-h28kv4-s8192-d128-causal-bf16", "Qwen/Qwen2.5-7B config: 28 heads, 4 KV heads, hidden 3584"),
    "qwen3-8b-32k": ("b1-h32kv8-s32768-d128-causal-bf16", "Qwen/Qwen3-8B config: 32 heads, 8 KV heads, head_dim 128"),
    "mistral-7b": ("b1-h32kv8-s8192-d128-causal-win4096-bf16", "mistralai/Mistral-7B-v0.1 config: sliding_window 4096"),
    "gemma2-9b-local": (
        "b1-h16kv8-s8192-d256-causal-win4096-cap50-bf16",
        "google/gemma-2-9b config: head_dim 256, attn_logit_softcapping 50, sliding_window 4096",
    ),
    "gemma2-9b-global": ("b1-h16kv8-s8192-d256-causal-cap50-bf16", "the same, its layers without a window"),
    "gemma2-27b": (
        "b1-h32kv16-s8192-d128-causal-cap50-scale144-bf16",
        "google/gemma-2-27b config: query_pre_attn_scalar 144, attn_logit_softcapping 50",
    ),
    "dsv3-mla-prefill": (
        "b1-h128-s4096-d192v128-causal-bf16",
        "deepseek-ai/DeepSeek-V3 config: 128 heads, qk_nope 128 + qk_rope 64, v_head_dim 128",
    ),
    "dsv3-mla-decode": (
        "b64-h128kv1-q1kv4096-d576v512-causal-scale192-bf16",
        "the same with the projections absorbed: kv_lora_rank 512 + qk_rope 64 as one KV head",
    ),
    # images, video, audio
    "flux-1024px": (
        "b1-h24-s4608-d128-bf16",
        "black-forest-labs/FLUX.1-dev config: 24 heads of 128; 4096 image + 512 text tokens",
    ),
    "wan2.2-a14b": ("b1-h40-s32760-d128-bf16", "Wan-AI/Wan2.2 A14B config: 40 heads, dim 5120; 480p, 81 frames"),
    "sdxl-self": ("b2-h10-s4096-d64-bf16", "stabilityai/sdxl-base-1.0 UNet: 640 channels in heads of 64, 64 × 64 latents"),
    "sdxl-cross": ("b2-h10-q4096kv77-d64-bf16", "the same against 77 text tokens"),
    "sd15-self": ("b2-h8-s4096-d40-bf16", "Stable Diffusion v1 inference config: num_heads 8 of 320 channels, 64 × 64 latents"),
    "sd15-cross": ("b2-h8-q4096kv77-d40-bf16", "the same against 77 text tokens"),
    "dit-xl-2-256px": ("b32-h16-s256-d72-bf16", "facebookresearch/DiT DiT-XL/2: hidden 1152, 16 heads, 16 × 16 patches"),
    "vit-l-16": ("b64-h16-s197-d64-bf16", "google/vit-large-patch16-224: hidden 1024, 16 heads, 196 patches + 1"),
    "vit-h-14": ("b64-h16-s257-d80-bf16", "google/vit-huge-patch14-224: hidden 1280, 16 heads, 256 patches + 1"),
    "whisper-large-enc": ("b8-h20-s1500-d64-bf16", "openai/whisper-large config: 20 heads, d_model 1280, 1500 audio positions"),
    "whisper-large-cross": ("b8-h20-q1kv1500-d64-bf16", "the same, one text token against the audio"),
}
PRESETS |= {
    f"fa-d{d}-s{s}{mask}": (
        f"b{16384 // s}-h{2048 // d}-s{s}-d{d}{mask}-bf16",
        "FlashAttention papers: 16384 tokens, hidden 2048",
    )
    for d in (64, 128, 256)
    for s in (512, 1024, 2048, 4096, 8192, 16384)
    for mask in ("", "-causal")
}
PRESETS |= {
    f"adversarial-{q}x{kv}-d{d}{mask}": (f"b2-h6kv3-q{q}kv{kv}-d{d}{mask}-bf16", "odd sizes from FlashAttention's tests")
    for q, kv in ((113, 203), (1023, 1024), (799, 3))
    for d in (64, 96)
    for mask in ("", "-causal")
}

# options, head counts and lengths that kernels get right alone and wrong together: checked beside the default presets, not
# timed; so small that a CPU takes them as they are
COMBINATIONS = {
    "adversarial-offset": (
        "b3-h6kv2-q113kv333-d64-causal-bf16",
        "combinations that kernels get wrong: causal with q_len < kv_len, ragged tiles, heads in threes, batch 3",
    ),
    "adversarial-ragged": (
        "b3-h6kv2-q113kv203-d64-bf16",
        "lengths like those of adversarial-offset without a mask, which would hide the last tile's padding from most queries",
    ),
    "adversarial-window": (
        "b2-h8kv2-q8kv131-d64-causal-win66-bf16",
        "a window that ends inside a tile and at its border, and few queries, as in speculative decoding",
    ),
    "adversarial-all-options": (
        "b3-h6kv2-q77kv133-d80-causal-win37-cap20-scale50-bf16",
        "causal, window, softcap and a scale of its own together, at a head dim that is padded",
    ),
    "adversarial-decode": (
        "b2-h16kv2-q1kv1090-d128-causal-win100-cap50-bf16",
        "one query, whose path is often another kernel, over split keys, in groups of eight, with window and softcap",
    ),
    "adversarial-split": (
        "b4-h16kv2-q1kv1090-d128-causal-bf16",
        "one query that sees every key, so that each split has its share, and no option that few kernels have",
    ),
    "adversarial-blind": (
        "b2-h2kv1-q168kv40-d40-causal-bf16",
        "more queries than keys, of which the first see none, at a head dim that is padded, and one KV head for all",
    ),
    "adversarial-value-dim": (
        "b1-h10kv2-q77kv203-d112v128-bf16",
        "values longer than keys, both padded, no mask, and heads in fives",
    ),
    "adversarial-mla": (
        "b1-h4kv2-q77kv203-d192v128-causal-bf16",
        "values shorter than keys, as in multi-head latent attention",
    ),
    "adversarial-group": (
        "b5-h28kv4-s65-d96-causal-bf16",
        "heads in sevens, as one model has them, in a batch of five, and one key more than a tile",
    ),
    "adversarial-cross": (
        "b4-h9kv3-q150kv77-d72-bf16",
        "more queries than keys and no mask, an odd number of heads, at a head dim that is padded",
    ),
    "adversarial-aligned-queries": (
        "b2-h5-q128kv77-d64-bf16",
        "queries in whole tiles and keys not, where a kernel may take one for the other",
    ),
    "adversarial-aligned-keys": (
        "b2-h8kv2-q64kv192-d128-causal-fp16",
        "queries, keys and their offset in whole tiles, as a prompt in chunks has them; and what is written for float16 alone",
    ),
    "adversarial-aligned-window": (
        "b1-h16kv1-s256-d128-causal-win128-bf16",
        "everything in whole tiles, the window too, so that tiles are skipped at its edge; all heads on one KV head",
    ),
    "adversarial-wide-window": (
        "b1-h4-s400-d64-causal-win258-bf16",
        "a window two keys longer than two tiles, so that its far edge crosses a tile's between two rows of one tile of queries",
    ),
    "adversarial-aligned-decode": (
        "b1-h18kv2-q1kv256-d128-bf16",
        "one query of one sequence, heads in nines, keys in whole tiles and no mask",
    ),
    "adversarial-page": (
        "b2-h14kv2-q1kv129-d64-causal-cap20-scale50-bf16",
        "one query whose key opens a tile, or a page, heads in sevens, softcap and scale without a window",
    ),
    "adversarial-short": (
        "b4-h8-q1kv40-d64-causal-bf16",
        "one query and fewer keys than a tile, or than splits have, each head with its own",
    ),
    "adversarial-tiny": (
        "b2-h4kv2-q3kv7-d64-causal-bf16",
        "fewer queries and keys than any tile, or step of one, has",
    ),
    "adversarial-far": (
        "b1-h4kv1-q150kv1175-d64-causal-bf16",
        "queries far behind the first keys, one past a tile's border",
    ),
    "adversarial-cap": (
        "b1-h4kv2-s130-d256-causal-cap50-scale64-bf16",
        "the largest head dim that most kernels have, with softcap and scale, in prefill and without a window",
    ),
    "adversarial-local": (
        "b1-h4kv2-s140-d256-causal-win127-cap50-bf16",
        "the same head dim with a window, one key short of tiles, and the usual scale",
    ),
    "adversarial-few": (
        "b3-h8kv2-q7kv150-d256-bf16",
        "few queries without a mask, which would hide the last keys from some, at the largest head dim",
    ),
    "adversarial-cross-decode": (
        "b3-h5-q1kv350-d64-scale50-bf16",
        "one query without a mask, heads with keys of their own, and a scale of its own",
    ),
    "adversarial-mla-decode": (
        "b2-h20kv1-q1kv333-d192v128-bf16",
        "one query, no mask, values shorter than keys, and more heads on one KV head than the lowest tile has rows",
    ),
    "adversarial-many": (
        "b9-h34kv17-s13-d64-causal-bf16",
        "more batches and heads than small tables and masks of bits have, and more KV heads than keys",
    ),
    "adversarial-long": (
        "b1-h2kv1-s600-d128-causal-scale144-bf16",
        "more tiles than a pipeline has stages, of queries and of keys, at the usual head dim",
    ),
    "adversarial-long-cross": (
        "b3-h1-q300kv600-d128-bf16",
        "more tiles of keys than a pipeline has stages, without a mask, and one head",
    ),
    "adversarial-single-options": (
        "b2-h3-q70kv100-d64-causal-win37-cap20-fp32",
        "options in float32, which some kernels leave to other code",
    ),
    "adversarial-single": (
        "b1-h6kv2-s197-d128-fp32",
        "what is written for float32 alone",
    ),
}
# with these, any two of dtype, mask, softcap, scale, sharing of heads, lengths, head dims and batch occur together
COMBINATIONS |= {
    f"adversarial-mixed-{number}": (text, "pairs of conditions that the named ones lack, as tests/test_presets.py counts them")
    for number, text in enumerate(
        (
            "b1-h14kv2-q10kv45-d40v24-cap20-scale50-fp16",
            "b1-h12kv2-q100kv64-d160v192-causal-win37-cap20-scale96-fp32",
            "b2-h4kv1-q3kv530-d80v96-causal-cap20-scale50-fp32",
            "b2-h3-s79-d32v64-causal-win18-cap20-scale50-fp16",
            "b2-h2-q70kv50-d128v64-causal-win19-cap20-scale96-fp32",
            "b2-h2kv1-q530kv516-d144v64-scale96-fp16",
            "b1-h5-q1kv192-d96v64-causal-win65-cap20-fp16",
            "b1-h6kv2-q1kv128-d44v80-causal-fp32",
            "b1-h4kv1-q20kv60-d64v96-causal-win21-cap20-fp16",
            "b1-h3-q7kv128-d64v40-causal-cap1.5-fp32",
            "b2-h14kv2-q40kv600-d40v64-causal-win130-fp32",
            "b1-h3-q9kv50-d192v128-causal-win20-scale96-fp32",
            "b3-h9kv3-s7-d96v80-cap20-fp16",
            "b1-h6kv3-q12kv515-d128v160-causal-win100-fp32",
        ),
        1,
    )
}
PRESETS |= COMBINATIONS
# a size that overflows, and so never in a default set
PRESETS["large-grid"] = ("b2560-h32-s16-d64-bf16", "batch · heads 81920: a CUDA grid's y and z end at 65535")

DEFAULT_PRESETS = ("seed", "seed-causal", "llama3-8b-prefill", "small", "odd")

CPU_RULE = (
    "batch ≤ 2, heads ÷ 4 (or 2, or 1: what divides heads and KV heads), lengths and window above 256 ÷ 32 "
    "(not below 32; their order and what they have over a multiple of 16 stay)"
)
AS_IT_IS = 256  # a length that needs no scaling


def preset(name: str) -> Workload:
    """The workload of a preset's name, at full size. Raises KeyError."""
    return Workload.parse(PRESETS[name][0])


def cpu_sized(w: Workload) -> Workload:
    """`w` scaled down by CPU_RULE; head dims, mask kind and dtype stay."""
    divide = next(n for n in (4, 2, 1) if w.heads % n == 0 and w.kv_heads % n == 0)
    q_len, kv_len, window = map(_shorter, (w.q_len, w.kv_len, w.window))
    if w.q_len > w.kv_len:
        q_len += _multiple(kv_len + 1 - q_len)
    elif w.q_len < w.kv_len:
        kv_len += _multiple(q_len + 1 - kv_len)
    if w.window >= w.kv_len:  # which hides nothing, and the other must still hide some keys
        window += _multiple(kv_len - window)
    else:
        window -= _multiple(window + 1 - kv_len)
    return w.replace(
        batch=min(w.batch, 2),
        heads=w.heads // divide,
        kv_heads=w.kv_heads // divide,
        q_len=q_len,
        kv_len=kv_len,
        window=window,
    )


def _shorter(length: int) -> int:
    return length if length <= AS_IT_IS else max(length // 32 // 16 * 16, 32) + length % 16


def _multiple(missing: int) -> int:
    """The least multiple of 16 that is at least `missing`, 0 where nothing is."""
    return max(0, -(-missing // 16) * 16)
