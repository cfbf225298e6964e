"""cuDNN's fused attention through its own graph API, forward and backward. https://github.com/NVIDIA/cudnn-frontend"""

import inspect
import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from attn_impls import Unsupported, Workload, attention


@attention(
    "cudnn-frontend",
    dist="nvidia-cudnn-frontend",
    devices=("cuda",),
    install="pip install nvidia-cudnn-frontend",
)
def cudnn_frontend(w: Workload):
    """The forward plan is made here, those for training in the first call that wants a gradient. One call at a time."""
    if w.dtype == torch.float32:
        raise Unsupported("cuDNN's fused attention takes fp16 and bf16 only")
    if w.softcap:
        raise Unsupported("cuDNN's fused attention has a softcap only as a score modifier, which excludes masks")
    plans = _Plans(w)
    attend = plans.inference()
    trained = None

    def kernel(q, k, v):
        nonlocal trained
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            trained = trained or _for_training(w, plans)
            return _Trained.apply(*trained, q, k, v)
        return attend(q, k, v)

    return kernel


def _for_training(w: Workload, plans: "_Plans"):
    try:
        return plans.training(), _Plans(w).backward()  # whose thread is autograd's: a handle of its own
    except Unsupported as error:
        raise Unsupported(f"forward only: {error}") from None


class _Plans:
    """The graphs of one workload on the current device, with one handle, which is told when torch's stream changes."""

    def __init__(self, w: Workload):
        import cudnn

        if "tensor_uids" not in inspect.signature(cudnn.pygraph.execute).parameters:
            raise ImportError("needs nvidia-cudnn-frontend 1.32 or newer, whose execute takes tensor_uids")
        self.cudnn, self.w = cudnn, w
        self.stream: int | None = None
        self.dtype = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}[w.dtype]
        out = w.shapes()["out"]
        self.shapes = w.shapes() | {"dout": out, "stats": (*out[:3], 1)}
        try:
            self.handle = cudnn.create_handle()
        except RuntimeError as error:  # so its bindings say that the library does not load
            raise ImportError(f"cuDNN does not start: {error}") from None

    def inference(self):
        """Compute out from q, k and v."""
        graph, given, of_out, _ = self._forward(generate_stats=False)
        run, shape = self._planned(graph, given, {"out": of_out}), self.shapes["out"]

        def attend(q, k, v):
            out = q.new_empty(shape)
            run(q, k, v, out)
            return out

        return attend

    def training(self):
        """Compute out, and stats for the backward pass, from q, k and v."""
        graph, given, of_out, of_stats = self._forward(generate_stats=True)
        run, shapes = self._planned(graph, given, {"out": of_out, "stats": of_stats}), self.shapes

        def attend(q, k, v):
            out, stats = q.new_empty(shapes["out"]), q.new_empty(shapes["stats"], dtype=torch.float32)
            run(q, k, v, out, stats)
            return out, stats

        return attend

    def backward(self):
        """Compute dq, dk and dv from q, k, v, out, dout and stats."""
        graph = self._graph()
        given = [self._tensor(graph, name) for name in ("q", "k", "v", "out", "dout", "stats")]
        made = graph.sdpa_backward(*given, attn_scale=self.w.scale, **self._mask())
        run = self._planned(graph, given, dict(zip("qkv", made, strict=True)))

        def differentiate(*tensors):
            gradients = [torch.empty_like(tensor) for tensor in tensors[:3]]
            run(*tensors, *gradients)
            return gradients

        return differentiate

    def _forward(self, generate_stats: bool):
        graph = self._graph()
        given = [self._tensor(graph, name) for name in "qkv"]
        made = graph.sdpa(*given, generate_stats=generate_stats, attn_scale=self.w.scale, **self._mask())
        return graph, given, *made

    def _graph(self):
        single = self.cudnn.data_type.FLOAT
        return self.cudnn.pygraph(
            io_data_type=self.dtype, intermediate_data_type=single, compute_data_type=single, handle=self.handle
        )

    def _tensor(self, graph, name: str):
        return graph.tensor(name=name, dim=list(self.shapes[name]), stride=self._strides(name), data_type=self._type(name))

    def _strides(self, name: str) -> list[int]:
        shape = self.shapes[name]
        return [math.prod(shape[dim + 1 :]) for dim in range(4)]

    def _type(self, name: str):
        return self.cudnn.data_type.FLOAT if name == "stats" else self.dtype

    def _planned(self, graph, given: list, made: dict[str, Any]):
        """Plan a graph that makes tensors of these shapes. Returns a function of all its tensors, given and made."""
        for name, tensor in made.items():
            shape, strides = list(self.shapes[name]), self._strides(name)
            tensor.set_output(True).set_dim(shape).set_stride(strides).set_data_type(self._type(name))
        try:
            graph.build([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        except (self.cudnn.cudnnGraphNotSupportedError, NotImplementedError) as error:
            raise Unsupported(f"cuDNN: {_reason(error)}") from None
        size, uids = graph.get_workspace_size(), tuple(node.get_uid() for node in (*given, *made.values()))
        # as torch's own generated code asks: `torch.cuda.current_stream` builds an object, for some 10 µs
        device, stream_of = torch.cuda.current_device(), torch._C._cuda_getCurrentRawStream
        execute, handle = graph.execute, self.handle

        def run(*tensors):
            stream = stream_of(device)
            if stream != self.stream:  # telling cuDNN costs more than asking torch
                self.cudnn.set_stream(handle, stream)
                self.stream = stream
            # made in the call, as SDPA's is: it is memory that the call holds, and no two streams share it. Of no bytes, it may
            # be anything.
            workspace = tensors[0].new_empty(size, dtype=torch.uint8) if size else tensors[0]
            execute(tensors, workspace, handle=handle, tensor_uids=uids)  # a dict of them costs 6 µs more

        return run

    def _mask(self) -> dict:
        """The band of visible keys around the diagonal: none to the right, `window` of them to the left, one's own counted."""
        w, alignment = self.w, self.cudnn.diagonal_alignment
        if not w.causal or (w.q_len == 1 and not w.window):  # the last query sees every key
            return {}
        corner = alignment.TOP_LEFT if w.q_len == w.kv_len else alignment.BOTTOM_RIGHT
        mask = {"diagonal_alignment": corner, "diagonal_band_right_bound": 0}
        return mask | ({"diagonal_band_left_bound": w.window} if w.window else {})


class _Trained(torch.autograd.Function):
    """Not differentiable twice; where dout needs no gradient, `create_graph` goes unheard."""

    @staticmethod
    def forward(ctx, attend, differentiate, q, k, v):
        out, stats = attend(q, k, v)
        ctx.differentiate = differentiate
        ctx.save_for_backward(q, k, v, out, stats)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, stats = ctx.saved_tensors
        return None, None, *ctx.differentiate(q, k, v, out, dout.contiguous(), stats)


def _reason(error: Exception) -> str:
    """Why cuDNN itself declined, without the reasons of engines for other GPUs that the message goes on with."""
    text = " ".join(str(error).split()).partition("; python engines declined")[0]
    return text.partition("the backend declined: ")[2] or text or "no plan for this graph"
