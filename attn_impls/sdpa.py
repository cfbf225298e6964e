"""torch scaled_dot_product_attention: its own dispatch, and each backend pinned.

https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
"""

import warnings

import torch
from torch.backends import cuda
from torch.nn.functional import scaled_dot_product_attention

from attn_impls import Unsupported, Workload, attention


def _arguments(w: Workload) -> dict:
    """SDPA's keywords for a workload. Its is_causal is aligned top-left, so any other mask is passed as a tensor."""
    if w.softcap:
        raise Unsupported("SDPA has no softcap")
    top_left = w.causal and not w.window and w.q_len == w.kv_len
    keywords: dict = {"scale": w.scale, "is_causal": top_left}
    if not top_left:
        keywords["attn_mask"] = w.mask(torch.get_default_device())
    if w.group > 1:
        keywords["enable_gqa"] = True
    return keywords


# On a GPU, where SDPA picks cuDNN, queries that see no key come out as something else than 0 (torch 2.11, H100)
BLIND = "cuDNN does not give 0 to queries that see no key (causal with q_len > kv_len)"


@attention("sdpa", dispatches=True)
def sdpa(w: Workload):
    if w.blind_rows and w.dtype != torch.float32 and torch.get_default_device().type == "cuda":
        raise Unsupported(f"SDPA may dispatch to cuDNN, and {BLIND}")
    keywords = _arguments(w)
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, **keywords)


# torch's switch and query for each backend; sdpa_kernel() does the same, but adds 15 µs of Python to every call
SWITCHES = {
    "math": (cuda.enable_math_sdp, cuda.math_sdp_enabled),
    "flash": (cuda.enable_flash_sdp, cuda.flash_sdp_enabled),
    "efficient": (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled),
    "cudnn": (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled),
}

CHECKS = {
    "flash": cuda.can_use_flash_attention,
    "efficient": cuda.can_use_efficient_attention,
    "cudnn": cuda.can_use_cudnn_attention,
}


def _pinned(w: Workload, backend: str):
    keywords = _arguments(w)
    switches = [(enable, enabled, name == backend) for name, (enable, enabled) in SWITCHES.items()]

    def kernel(q, k, v):
        before = [enabled() for _, enabled, _ in switches]
        for enable, _, wanted in switches:
            enable(wanted)
        try:
            return scaled_dot_product_attention(q, k, v, **keywords)
        finally:
            for (enable, _, _), was in zip(switches, before):  # noqa: B905  (strict= costs time in here)
                enable(was)

    _probe(w, kernel, keywords, backend)
    return kernel


def _probe(w: Workload, kernel, keywords: dict, backend: str) -> None:
    """Raise Unsupported with SDPA's own reasons where the pinned backend cannot take this workload."""
    q, k, v = (torch.empty(w.shapes()[name], dtype=w.dtype) for name in "qkv")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            kernel(q, k, v)
            return
        except RuntimeError as error:
            if not any(phrase in str(error) for phrase in ("No available kernel", "No viable backend", "Invalid backend")):
                raise
        if check := CHECKS.get(backend):
            mask, causal, gqa = keywords.get("attn_mask"), keywords["is_causal"], w.group > 1
            check(cuda.SDPAParams(q, k, v, mask, 0.0, causal, gqa), True)  # True: say why, as warnings
    said = [str(warning.message).split(" (Triggered internally")[0] for warning in caught]
    reasons = dict.fromkeys(text for text in said if "because" not in text and "not used" not in text)
    raise Unsupported(f"SDPA {backend}: {' '.join(reasons) or 'no kernel for these inputs'}")


@attention("sdpa-math")
def sdpa_math(w: Workload):
    return _pinned(w, "math")


@attention("sdpa-flash")
def sdpa_flash(w: Workload):
    return _pinned(w, "flash")


@attention("sdpa-efficient", devices=("cuda",))
def sdpa_efficient(w: Workload):
    return _pinned(w, "efficient")


@attention("sdpa-cudnn", devices=("cuda",))
def sdpa_cudnn(w: Workload):
    if w.blind_rows:
        raise Unsupported(BLIND)
    return _pinned(w, "cudnn")
