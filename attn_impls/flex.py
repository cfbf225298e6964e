"""torch flex_attention, compiled, the mask as a BlockMask built beforehand (He et al., 2024, arXiv 2412.05496)."""

import shutil

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attn_impls import Unsupported, Workload, attention

# what inductor says where the sizes are too large; the first half of each is said of configurations that broke, too
TOO_LARGE = (
    ("NoValidChoicesError", "No choices exist for backend"),  # it has none to try
    ("No valid triton configs", "out of resource"),  # none could be used, and the last took more shared memory than there is
)


@attention("flex", compiles="seconds")
def flex(w: Workload):
    device = torch.get_default_device()
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise Unsupported("torch.compile on a CPU needs a C++ compiler, and there is none on PATH")
    if device.type == "cpu" and torch.__version__ < "2.6":
        raise Unsupported("flex_attention on a CPU needs torch 2.6")
    if device.type == "cuda" and w.head_dim > 512:  # 576 in bf16: 336 KiB of shared memory, of an H100's 227
        raise Unsupported("flex_attention's kernel takes more shared memory than there is for head dims above 512")
    offset, window, cap = w.offset, w.window, w.softcap

    def sees(_batch, _head, i, j):
        visible = j <= i + offset
        return visible & (j > i + offset - window) if window else visible

    def capped(score, *_):
        return torch.tanh(score / cap) * cap

    # None where every query sees every key: an all-true mask costs 15 % on an H200 (b1-h32-s8192-d128-bf16)
    mask = create_block_mask(sees, None, None, w.q_len, w.kv_len, device=device) if w.causal else None
    torch._dynamo.reset()
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    score_mod, gqa = capped if cap else None, w.group > 1

    def kernel(q, k, v):
        try:
            return attend(q, k, v, score_mod=score_mod, block_mask=mask, scale=w.scale, enable_gqa=gqa)
        except Exception as error:  # the compiler's, whose classes differ between versions of torch
            if not any(all(part in str(error) for part in parts) for parts in TOO_LARGE):
                raise
            raise Unsupported("flex_attention: no configuration of its kernel for these sizes fits this GPU") from None

    return kernel
