"""Adapters cost nothing: each implementation against a direct call of its library, interleaved in one session."""

import statistics
import time

import pytest
import torch
from fakes import Rounds

from attn_impls import Unsupported, Workload
from attn_impls.harness import measure
from attn_impls.harness.inputs import plain
from attn_impls.registry import REGISTRY, discover

pytestmark = pytest.mark.gpu

W = Workload.parse("b1-h32-s4096-d128-causal-bf16")
SCALE = 128**-0.5


def direct_sdpa():
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)


def direct_pinned(backend):
    from torch.nn.attention import sdpa_kernel

    def call(q, k, v):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)

    return call


def direct_xformers(operator=None):
    from xformers.ops import LowerTriangularMask, fmha, memory_efficient_attention

    op = operator and (getattr(fmha, operator).FwOp, None)
    bias = LowerTriangularMask()
    return lambda q, k, v: memory_efficient_attention(q, k, v, bias, scale=SCALE, op=op)


def direct_flash_attn2():
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=True)


def direct_flash_attn3():
    from fa3_fwd_interface import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=True)


def direct_flash_attn4():
    from flash_attn.cute import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=True)


def direct_sage():
    from sageattention import sageattn

    def call(q, k, v):  # sageattn's own smoothing writes into k
        return sageattn(q, k - k.mean(dim=2, keepdim=True), v, is_causal=True, smooth_k=False)

    return call


def direct_cudnn_frontend():
    import cudnn

    handle, half, single = cudnn.create_handle(), cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=half, intermediate_data_type=single, compute_data_type=single, handle=handle)
    like = torch.empty(W.shapes()["q"], dtype=W.dtype, device="cuda")
    q, k, v = (graph.tensor_like(like) for _ in range(3))
    o, _ = graph.sdpa(q=q, k=k, v=v, is_inference=True, attn_scale=SCALE, use_causal_mask=True)
    o.set_output(True).set_dim(like.shape).set_stride(like.stride())
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device="cuda")

    def call(*inputs):
        out = torch.empty_like(like)
        graph.execute({q: inputs[0], k: inputs[1], v: inputs[2], o: out}, workspace, handle=handle)
        return out

    return call


def direct_flashinfer():
    from flashinfer import single_prefill_with_kv_cache

    return lambda q, k, v: single_prefill_with_kv_cache(q[0], k[0], v[0], causal=True)[None]


BACKENDS = torch.nn.attention.SDPBackend
DIRECT = {
    "sdpa": direct_sdpa,
    "sdpa-math": lambda: direct_pinned(BACKENDS.MATH),
    "sdpa-flash": lambda: direct_pinned(BACKENDS.FLASH_ATTENTION),
    "sdpa-efficient": lambda: direct_pinned(BACKENDS.EFFICIENT_ATTENTION),
    "sdpa-cudnn": lambda: direct_pinned(BACKENDS.CUDNN_ATTENTION),
    "xformers": direct_xformers,
    "xformers-cutlass": lambda: direct_xformers("cutlass"),
    "xformers-flash": lambda: direct_xformers("flash"),
    "flash_attn2": direct_flash_attn2,
    "flash_attn3": direct_flash_attn3,
    "flash_attn4": direct_flash_attn4,
    "sage": direct_sage,
    "cudnn-frontend": direct_cudnn_frontend,
    "flashinfer": direct_flashinfer,
}


def host_us(calls, clock, pairs=200):
    """The median µs that each of two calls costs the host, and the median of what the first costs more than its neighbour.

    Neighbours in either order: a slow spell of the host, which may last for thousands of calls, meets both.
    """
    taken = []
    for pair in range(pairs):
        if pair % 5 == 0:  # ten calls fit behind a spin
            clock.quiet()
            clock.driver.spin(measure.ENQUEUE_CYCLES)
        row = [0.0, 0.0]
        for one in (0, 1) if pair % 2 else (1, 0):
            started = clock.driver.host_time()
            calls[one]()
            row[one] = 1e6 * (clock.driver.host_time() - started)
        taken.append((*row, row[0] - row[1]))
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def test_what_an_adapter_costs_the_host_is_seen(suite):
    x = torch.zeros(1, device="cuda")

    def slow():
        until = time.perf_counter() + 20e-6
        while time.perf_counter() < until:
            pass
        return x + 1

    assert host_us((slow, lambda: x + 1), suite.clock)[2] == pytest.approx(20, abs=3)


@pytest.mark.parametrize("name", DIRECT)
def test_an_adapter_costs_nothing(name, suite, capsys):
    discover()
    implementation = REGISTRY[name]
    if suite.unavailable(implementation):
        pytest.skip(suite.unavailable(implementation))
    try:
        with torch.device("cuda"):
            kernel = implementation(W)
    except Unsupported as reason:
        pytest.skip(f"{name}: {reason}")
    direct, inputs = DIRECT[name](), plain(W, "cuda", 0).as_layout(implementation.layout)
    calls = (lambda: kernel(*inputs)), (lambda: direct(*inputs))
    timing = measure.run(Rounds(), suite.clock, *calls, rounds=400)  # FlashAttention 2's vary by 1 % from round to round
    ratio, low, high = measure.paired_ratio(timing)
    host = host_us(calls, suite.clock)
    with capsys.disabled():
        print(
            f"\n  {name:17} direct/adapter {ratio:.4f} [{low:.4f}, {high:.4f}]; host {host[0]:.1f} µs, direct {host[1]:.1f} µs"
            f", {host[2]:+.1f} µs",
            end="",
        )
    assert ratio == pytest.approx(1.0, abs=0.01)
    assert host[2] <= 5
