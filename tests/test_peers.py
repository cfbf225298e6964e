"""The order in which streams wait, and which stream moves which part, on streams that only write down what they are told."""

import contextlib

import pytest
import torch

from attn_impls.parallel import peers
from attn_impls.parallel.copied import GatherCopied
from attn_impls.parallel.peers import Peers


class Stream:
    """Remembers, of every job on it, which jobs of all streams came before it for certain."""

    def __init__(self, name):
        self.name, self.known = name, set()

    def wait_stream(self, other):
        self.known |= other.known

    def wait_event(self, event):
        self.known |= event

    def record_event(self):
        return set(self.known)


class Gpu:
    def __init__(self, monkeypatch):
        self.current, self.before = Stream("caller"), {}
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        monkeypatch.setattr(
            peers, "copy", lambda place, piece, stream: self.job(("copy", place.data_ptr(), piece.numel()), stream)
        )

    @contextlib.contextmanager
    def on(self, stream):
        last, self.current = self.current, stream
        yield
        self.current = last

    def job(self, what, stream=None):
        stream = stream or self.current
        self.before[what] = (stream.name, set(stream.known))
        stream.known.add(what)

    def barrier(self, channel):
        self.job(("barrier", channel))


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def made(gpu, rank, size, computing, pushing):
    """Peers without a GPU behind them."""
    one = Peers.__new__(Peers)
    one.rank, one.others = rank, [(rank + n) % size for n in range(1, size)]
    one.handle = gpu
    one.outputs = [torch.zeros(1, 8, 4, 2) for _ in range(size)]
    one.beside = [Stream(f"beside {n}") for n in range(computing - 1)]
    one.pushing = [Stream(f"push {n}") for n in range(pushing)]
    one.keeping = Stream("keep")
    return one


@pytest.mark.parametrize(("size", "computing", "pushing"), [(2, 1, 1), (2, 2, 2), (4, 2, 2), (8, 1, 3), (1, 1, 1)])
def test_what_waits_for_what(gpu, size, computing, pushing):
    one = made(gpu, 0, size, computing, pushing)
    gpu.job("the reader of the last result")
    one.enter()
    for chunk in range(3):
        with one.computing(chunk):
            gpu.job(("kernel", chunk))
            one.push(torch.zeros(1, 2, 4, 2), [output[:, 2 * chunk : 2 * chunk + 2] for output in one.outputs])
    one.leave()
    gpu.job("the next reader")
    copies = {job: told for job, told in gpu.before.items() if job[0] == "copy"}
    for (_, place, _), (_, before) in copies.items():
        rank, offset = next((n, place - t.data_ptr()) for n, t in enumerate(one.outputs) if 0 <= place - t.data_ptr() < t.nbytes)
        assert ("kernel", offset // (2 * 4 * 2 * 4)) in before  # of the two heads of this place
        assert "the reader of the last result" in before
        assert rank == 0 or ("barrier", 0) in before  # nobody writes to a rank that still reads
    assert set(copies) <= gpu.before["barrier", 1][1] <= gpu.before["the next reader"][1]
    assert ("barrier", 0) not in gpu.before["kernel", 0][1]  # which does not wait for the others
    assert ("barrier", 1) in gpu.before["the next reader"][1]
    assert sum(job[2] for job in copies) == size * 3 * 2 * 4 * 2
    assert len({name for name, _ in copies.values()} - {"keep"}) == min(pushing, 2 if size == 2 else pushing) * (size > 1)
    assert len({gpu.before["kernel", chunk][0] for chunk in range(3)}) == computing


@pytest.mark.parametrize("computing", [1, 2, 3])
def test_the_silent_twin_computes_on_the_same_streams_and_sends_nothing(gpu, computing):
    plan = GatherCopied.__new__(GatherCopied)
    plan.peers = made(gpu, 0, 2, computing, 2)
    plan.kernels = [lambda chunk: gpu.job(("kernel", chunk))] * 4
    gpu.job("what made the inputs")
    plan.silent([(chunk,) for chunk in range(4)])
    gpu.job("the next reader")
    kernels = [("kernel", chunk) for chunk in range(4)]
    assert set(gpu.before) == {"what made the inputs", *kernels, "the next reader"}
    for chunk, kernel in enumerate(kernels):
        with plan.peers.computing(chunk):  # as it is where chunks are sent
            assert gpu.before[kernel][0] == gpu.current.name
        assert "what made the inputs" in gpu.before[kernel][1]
    assert len({gpu.before[kernel][0] for kernel in kernels}) == computing
    assert set(kernels) <= gpu.before["the next reader"][1]


def test_no_two_ranks_begin_with_the_same(gpu):
    assert len({made(gpu, rank, 4, 1, 1).others[0] for rank in range(4)}) == 4
