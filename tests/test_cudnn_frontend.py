"""What the adapter of cuDNN's frontend asks of it, which a stand-in here computes on the CPU."""

import sys
import types

import pytest
import torch
from test_adapters import attention_over, judged, unsupported

from attn_impls import Unsupported
from attn_impls.harness.case import Broken, Case, build
from attn_impls.harness.inputs import plain
from attn_impls.harness.judge import Problem
from attn_impls.registry import REGISTRY, discover
from attn_impls.workload import Workload

DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}
WORKSPACE = 100  # bytes, in training


@pytest.fixture(autouse=True, scope="module")
def _discovered():
    discover()


class Node:
    """A tensor of a graph."""

    def __init__(self, name, dim=None, stride=None, data_type=None):
        self.name, self.dim, self.stride, self.data_type, self.output = name, dim, stride, data_type, False

    def get_uid(self):
        return id(self)

    def set_output(self, output):
        self.output = output
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_data_type(self, data_type):
        self.data_type = data_type
        return self

    def holds(self, tensor):
        assert (list(tensor.shape), list(tensor.stride())) == (self.dim, self.stride)
        assert tensor.dtype == DTYPES[self.data_type]


class Graph:
    """One attention node, or its backward pass, computed when executed."""

    refuses = refuses_training = refuses_backward = ""
    fake: types.SimpleNamespace

    def __init__(self, handle, **_):
        self.handle = handle

    def tensor(self, name, dim, stride, data_type):
        return Node(name, dim, stride, data_type)

    def sdpa(self, q, k, v, generate_stats, **wanted):
        self.refuses = self.refuses or (generate_stats and self.refuses_training)
        self.operands, self.wanted, self.workspace = (q, k, v), wanted, WORKSPACE * generate_stats
        self.results = (Node("o"), Node("stats") if generate_stats else None)
        return self.results

    def sdpa_backward(self, q, k, v, o, dO, stats, **wanted):
        self.refuses = self.refuses or self.refuses_backward
        self.operands, self.wanted, self.workspace = (q, k, v, o, dO, stats), wanted, WORKSPACE
        self.results = tuple(Node(f"d{name}") for name in "qkv")
        assert [tensor.name for tensor in self.operands] == ["q", "k", "v", "out", "dout", "stats"]
        return self.results

    def build(self, _heuristics):
        if self.refuses:
            raise NotImplementedError(self.refuses)
        assert all(made.output for made in self.results if made)
        self.fake.built += 1

    def get_workspace_size(self):
        return self.workspace

    def execute(self, tensor_dict, workspace, handle, tensor_uids):
        tensors = dict(zip(tensor_uids, tensor_dict, strict=True))
        assert handle == self.handle
        assert self.fake.told.get(handle) == self.fake.stream
        made = [*filter(None, self.results)]
        assert set(tensors) == {node.get_uid() for node in (*self.operands, *made)}
        for node in (*self.operands, *made):
            node.holds(tensors[node.get_uid()])
        inputs = [tensors[operand.get_uid()] for operand in self.operands]
        assert workspace.device == inputs[0].device
        assert workspace.nbytes >= self.workspace
        found = self._forward(*inputs) if len(inputs) == 3 else self._backward(*inputs)
        for node, value in zip(self.results, found, strict=True):
            if node:
                tensors[node.get_uid()].copy_(value)

    def _attention(self, q, k, v):
        wanted = self.wanted
        right, left = wanted.get("diagonal_band_right_bound"), wanted.get("diagonal_band_left_bound", 0)
        alignment = wanted.get("diagonal_alignment", "bottom right")
        assert alignment == "bottom right" or q.shape[2] == k.shape[2]
        return attention_over(q, k, v, causal=right == 0, window=left, scale=wanted["attn_scale"])

    def _forward(self, q, k, v):
        out = self._attention(q, k, v)
        return out, out.float().norm(dim=-1, keepdim=True)  # statistics that the backward pass can know again

    def _backward(self, q, k, v, out, dout, stats):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            again = self._attention(q, k, v)
        assert torch.equal(again, out)
        assert torch.equal(stats, out.float().norm(dim=-1, keepdim=True))
        return torch.autograd.grad(again, (q, k, v), dout)


@pytest.fixture
def cudnn(monkeypatch):
    module = types.SimpleNamespace(
        create_handle=object,
        set_stream=lambda handle, stream: module.tellings.append((handle, stream)) or module.told.update({handle: stream}),
        pygraph=type("pygraph", (Graph,), {}),
        data_type=types.SimpleNamespace(HALF="half", BFLOAT16="bfloat16", FLOAT="float"),
        diagonal_alignment=types.SimpleNamespace(TOP_LEFT="top left", BOTTOM_RIGHT="bottom right"),
        heur_mode=types.SimpleNamespace(A="a", FALLBACK="fallback"),
        cudnnGraphNotSupportedError=ValueError,
        built=0,
        stream=0,
        tellings=[],
        told={},  # the stream that each handle was told of last
    )
    module.pygraph.fake = module
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: {3: module.stream}[device], raising=False)
    return module


def judged_gradients(text):
    w = Workload.parse(text)
    case = Case(w, REGISTRY["cudnn-frontend"], "cpu", "backward")
    problem = Problem(w, "cpu", 0)
    kernel = problem.build(case).kernel
    return problem.judge_gradients(case, kernel, problem.first_pass(case, kernel))


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize(
    "text",
    [
        "b2-h4kv2-s70-d64-bf16",
        "b1-h4kv2-s70-d64-causal-fp16",
        "b1-h2-q30kv70-d64-causal-bf16",
        "b1-h2-q1kv70-d64-causal-bf16",
        "b1-h2-q30kv70-d192v128-causal-win20-scale144-bf16",
        "b1-h2-q1kv70-d64-causal-win20-bf16",
    ],
)
def test_outputs_and_gradients(text):
    assert not judged("cudnn-frontend", text).disqualified
    assert not judged_gradients(text).failure


W = Workload.parse("b2-h4kv2-q30kv70-d64v32-causal-bf16")


def trained(kernel, *wanted):
    """A forward pass in which some of q, k and v want a gradient; returns its output and all three."""
    inputs = [x.requires_grad_(name in wanted) for name, x in zip("qkv", plain(W, "cpu", 0), strict=True)]
    return kernel(*inputs), inputs


def test_plans_are_made_once_and_those_for_training_when_first_wanted(cudnn):
    kernel = REGISTRY["cudnn-frontend"](W)
    for _ in range(2):
        trained(kernel)
    assert cudnn.built == 1
    with torch.no_grad():
        assert not trained(kernel, "q", "k", "v")[0].requires_grad
    assert cudnn.built == 1
    for _ in range(2):
        out, _ = trained(kernel, "q", "k", "v")
        out.backward(torch.ones_like(out))
    assert cudnn.built == 3
    assert len(cudnn.told) == 2  # the backward pass has a handle of its own: its thread is autograd's


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("wanted", "qkv")
def test_one_gradient_alone_and_a_dout_that_is_expanded(wanted):
    kernel = REGISTRY["cudnn-frontend"](W)
    with torch.device("meta"):  # what is planned and allocated in a call must not go by the default
        out, inputs = trained(kernel, wanted)
        out.sum().backward()
    every, right = trained(kernel, "q", "k", "v")
    every.backward(torch.ones_like(every))
    for name, mine, its in zip("qkv", inputs, right, strict=True):
        assert (mine.grad is not None) == (name == wanted)
        assert name != wanted or torch.equal(mine.grad, its.grad)


def test_a_stream_that_changes_is_told(cudnn):
    kernel = REGISTRY["cudnn-frontend"](W)
    for cudnn.stream in (7, 7, 8):
        trained(kernel)  # what is executed there asserts it
        out, _ = trained(kernel, "v")
        out.sum().backward()
    assert sorted(stream for _, stream in cudnn.tellings) == [7, 7, 8, 8]


@pytest.mark.usefixtures("cudnn")
def test_no_second_derivative():
    out, (q, _, _) = trained(REGISTRY["cudnn-frontend"](W), "q", "k", "v")
    dout = torch.ones_like(out).requires_grad_()
    [dq] = torch.autograd.grad(out, q, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "no engine proposed a plan (the backend declined: s_q > s_kv\n is not supported; python engines declined: sm100: no)",
            "cuDNN: s_q > s_kv is not supported",
        ),
        ("head dims\nup to 256", "cuDNN: head dims up to 256"),
        ("", "cuDNN: no plan for this graph"),
    ],
)
def test_what_cudnn_refuses(cudnn, monkeypatch, said, reason):
    for error in (cudnn.cudnnGraphNotSupportedError, NotImplementedError):

        def refuse(_graph, _heuristics, error=error):
            raise error(said)

        monkeypatch.setattr(Graph, "build", refuse)
        assert unsupported("cudnn-frontend", "b1-h2-s64-d64-bf16") == reason


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("refuses", ["refuses_training", "refuses_backward"])
def test_a_cudnn_without_this_backward_pass_is_forward_only(monkeypatch, refuses):
    monkeypatch.setattr(Graph, refuses, "(the backend declined: no dgrad at head dim 256; python engines declined: x)")
    assert not judged("cudnn-frontend", "b1-h2-s64-d64-bf16").disqualified
    with pytest.raises(Unsupported, match=r"^forward only: cuDNN: no dgrad at head dim 256$"):
        judged_gradients("b1-h2-s64-d64-bf16")


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize(("text", "reason"), [("b1-h2-s64-d64-fp32", "fp16 and bf16"), ("b1-h2-s64-d64-cap50-bf16", "softcap")])
def test_what_cudnn_cannot_do(text, reason):
    assert reason in unsupported("cudnn-frontend", text)


def test_a_cudnn_frontend_that_is_too_old_is_broken(cudnn, monkeypatch):
    monkeypatch.setattr(cudnn.pygraph, "execute", lambda _graph, _tensors, _workspace, _handle: None)
    w = Workload.parse("b1-h2-s64-d64-bf16")
    with pytest.raises(Broken, match=r"needs nvidia-cudnn-frontend 1\.32 or newer"):
        build(Case(w, REGISTRY["cudnn-frontend"], "cpu"), plain(w, "cpu", 0))


def test_a_cudnn_that_does_not_start_is_broken(cudnn):
    def create_handle():
        raise RuntimeError("Unable to find symbol cudnnCreate")

    cudnn.create_handle = create_handle
    w = Workload.parse("b1-h2-s64-d64-bf16")
    with pytest.raises(Broken, match=r"cuDNN does not start: Unable to find symbol cudnnCreate"):
        build(Case(w, REGISTRY["cudnn-frontend"], "cpu"), plain(w, "cpu", 0))
