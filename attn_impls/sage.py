"""SageAttention 1 (Zhang et al., 2024, arXiv 2410.02367): q·kᵀ in int8, the rest in fp16. https://github.com/thu-ml/SageAttention"""

from attn_impls import Unsupported, Workload, attention


@attention(
    "sage",
    dist="sageattention",
    devices=("cuda",),
    backward=False,
    approximate="int8",
    install="pip install sageattention==1.0.6",
)
def sage(w: Workload):
    if not sage.version.startswith("1."):
        raise Unsupported(f"written for SageAttention 1, whose p·v is fp16; {sage.version} is installed")
    from sageattention import sageattn

    if w.window or w.softcap:
        raise Unsupported("SageAttention 1 has no window and no softcap")
    if w.head_dim not in (64, 96, 128) or w.v_head_dim != w.head_dim:
        raise Unsupported("SageAttention 1 takes head dims 64, 96 and 128, v_head_dim = head_dim")
    if w.causal and w.q_len != w.kv_len:
        raise Unsupported("SageAttention 1 is causal for q_len = kv_len only")
    if not w.causal and w.kv_len % 64:
        raise Unsupported("SageAttention 1 gives weight to what lies beyond the last key unless kv_len is a multiple of 64")

    def kernel(q, k, v):
        # smooth_k subtracts the mean from the caller's k in place; this costs the same and leaves k as it was
        smooth = k - k.mean(dim=2, keepdim=True)
        return sageattn(q, smooth, v, tensor_layout="HND", is_causal=w.causal, sm_scale=w.scale, smooth_k=False)

    return kernel
