"""cuDNN's fused attention through its own graph API, planned in the builder. https://github.com/NVIDIA/cudnn-frontend"""

import torch

from attn_impls import Unsupported, Workload, attention


@attention(
    "cudnn-frontend",
    dist="nvidia-cudnn-frontend",
    devices=("cuda",),
    backward=False,
    install="pip install nvidia-cudnn-frontend",
)
def cudnn_frontend(w: Workload):
    import cudnn

    if w.dtype == torch.float32:
        raise Unsupported("cuDNN's fused attention takes fp16 and bf16 only")
    if w.softcap:
        raise Unsupported("cuDNN's fused attention has a softcap only as a score modifier, which excludes masks")
    dtype = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}[w.dtype]
    try:
        handle = cudnn.create_handle()
    except RuntimeError as error:  # so its bindings say that the library does not load
        raise ImportError(f"cuDNN does not start: {error}") from None
    shapes = w.shapes()
    strides = {name: torch.empty(shape, device="meta").stride() for name, shape in shapes.items()}
    accumulate = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=dtype, intermediate_data_type=accumulate, compute_data_type=accumulate, handle=handle)
    tensors = [graph.tensor(name=n, dim=list(shapes[n]), stride=list(strides[n]), data_type=dtype) for n in "qkv"]
    o, _ = graph.sdpa(*tensors, generate_stats=False, attn_scale=w.scale, **_mask(w, cudnn.diagonal_alignment))
    o.set_output(True).set_dim(list(shapes["out"])).set_stride(list(strides["out"])).set_data_type(dtype)
    try:
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    except (cudnn.cudnnGraphNotSupportedError, NotImplementedError) as error:
        raise Unsupported(f"cuDNN: {_reason(error)}") from None
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8)

    of_q, of_k, of_v = tensors
    size, used, device = shapes["out"], None, torch.cuda.current_device()
    # as torch's own generated code asks: `torch.cuda.current_stream` builds an object, for some 10 µs
    stream_of = torch._C._cuda_getCurrentRawStream

    def kernel(q, k, v):
        nonlocal used
        out = q.new_empty(size)
        stream = stream_of(device)
        if stream != used:  # telling cuDNN costs more than asking torch
            cudnn.set_stream(handle, stream)
            used = stream
        graph.execute({of_q: q, of_k: k, of_v: v, o: out}, workspace, handle=handle)
        return out

    return kernel


def _reason(error: Exception) -> str:
    """Why cuDNN itself declined, without the reasons of engines for other GPUs that the message goes on with."""
    text = " ".join(str(error).split()).partition("; python engines declined")[0]
    return text.partition("the backend declined: ")[2] or text or "no plan for this graph"


def _mask(w: Workload, alignment) -> dict:
    """The band of visible keys around the diagonal: none to the right, `window` of them to the left, one's own counted."""
    if not w.causal or (w.q_len == 1 and not w.window):  # the last query sees every key
        return {}
    corner = alignment.TOP_LEFT if w.q_len == w.kv_len else alignment.BOTTOM_RIGHT
    mask = {"diagonal_alignment": corner, "diagonal_band_right_bound": 0}
    return mask | ({"diagonal_band_left_bound": w.window} if w.window else {})
