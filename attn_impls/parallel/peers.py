"""Every rank's output mapped into each of them, and copies into it by the copy engines, beside what the SMs compute.

The outputs live in symmetric memory (torch.distributed._symmetric_memory).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..registry import Unsupported, one_line

DEVICE_TO_DEVICE = 3  # cudaMemcpyKind


class Peers:
    """The outputs of all ranks, seen from one: `enter`, then for each chunk `computing` and `push`, then `leave`.

    To compute alone: `fork`, for each chunk `computing`, then `join`.
    """

    @staticmethod
    def check(device: str, size: int) -> None:
        """Raise Unsupported where this rank cannot reach the others' memory."""
        if device != "cuda":
            raise Unsupported("copy engines and symmetric memory are a GPU's")
        from torch.distributed import _symmetric_memory as symmetric

        if not (hasattr(symmetric, "empty") and hasattr(symmetric, "rendezvous")):
            raise Unsupported(f"symmetric memory needs torch 2.6 or newer, this is {torch.__version__}")
        mine, count = torch.cuda.current_device(), torch.cuda.device_count()
        if count < size:
            raise Unsupported(f"copies reach the GPUs of one machine: this one has {count} for {size} ranks")
        barred = [n for n in range(size) if n != mine and not torch.cuda.can_device_access_peer(mine, n)]
        if barred:
            raise Unsupported(f"GPU {mine} cannot reach the memory of GPU {', '.join(map(str, barred))} (no peer access)")
        _runtime()

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, rank: int, size: int, streams: tuple[int, ...]):
        """streams: how many compute, and how many push. All ranks call it together."""
        # private in name, the documented way to it: PyTorch's own tensor-parallel overlap stands on it
        from torch.distributed import _symmetric_memory as symmetric

        self.rank, self.others = rank, [(rank + n) % size for n in range(1, size)]  # no two ranks begin with the same
        world = dist.group.WORLD
        assert world is not None, "the ranks have met"
        try:
            mine = symmetric.empty(shape, dtype=dtype, device=torch.device("cuda", torch.cuda.current_device()))
            mine.fill_(float("nan"))  # what nobody writes must not look right
            torch.cuda.synchronize()
            self.handle: Any = symmetric.rendezvous(mine, world)
        except RuntimeError as error:
            raise Unsupported(f"symmetric memory: {one_line(error)}") from None
        self.outputs = [self.handle.get_buffer(rank, shape, dtype) for rank in range(size)]
        computing, pushing = streams
        self.beside = [torch.cuda.Stream() for _ in range(computing - 1)]  # the caller's own is one
        self.pushing = [torch.cuda.Stream() for _ in range(pushing)]
        self.keeping = torch.cuda.Stream()  # for a rank's copies to itself

    def fork(self) -> None:
        """Let the streams that compute begin where the caller's stands."""
        self.caller = torch.cuda.current_stream()
        for stream in self.beside:
            stream.wait_stream(self.caller)

    def join(self) -> None:
        """Let the caller's stream go on when all that was computed is done."""
        for stream in self.beside:
            self.caller.wait_stream(stream)

    def enter(self) -> None:
        """Wait, beside the first kernel, until no rank reads the last result any more."""
        self.fork()
        for stream in (*self.pushing, self.keeping):
            stream.wait_stream(self.caller)
        first, *rest = self.pushing
        with torch.cuda.stream(first):
            self.handle.barrier(channel=0)
        for stream in rest:
            stream.wait_stream(first)

    def computing(self, chunk: int) -> contextlib.AbstractContextManager[Any]:
        """The stream for a chunk's kernel: on several in turn, the next kernel fills the SMs that the last one leaves."""
        streams = [self.caller, *self.beside]
        return torch.cuda.stream(streams[chunk % len(streams)])

    def push(self, out: torch.Tensor, places: list[torch.Tensor]) -> None:
        """Copy what the current stream computes to its place in every rank's output."""
        done = torch.cuda.current_stream().record_event()
        parts = max(1, len(self.pushing) // max(1, len(self.others)))
        queues = itertools.cycle(self.pushing)
        jobs = [(self.keeping, places[self.rank], out)]
        for other in self.others:
            pieces = zip(places[other].chunk(parts, 1), out.chunk(parts, 1), strict=True)
            jobs += [(next(queues), place, piece) for place, piece in pieces]
        for stream, place, piece in jobs:
            stream.wait_event(done)
            copy(place, piece, stream)
            out.record_stream(stream)

    def leave(self) -> None:
        """Let the caller's stream go on when every rank's heads have landed."""
        first, *rest = self.pushing
        for stream in (*rest, self.keeping):
            first.wait_stream(stream)
        with torch.cuda.stream(first):
            self.handle.barrier(channel=1)
        self.caller.wait_stream(first)


class Block(NamedTuple):
    """Rows of `width` elements, a pitch apart in the target and in the source; where each begins, in elements."""

    target: int
    source: int
    target_pitch: int
    source_pitch: int
    width: int
    rows: int


def blocks(target: torch.Tensor, source: torch.Tensor) -> list[Block]:
    """The fewest such blocks that copy one strided tensor to another of its shape."""
    return _blocks(target.shape, target.stride(), source.stride())


@functools.lru_cache(maxsize=256)  # the same few in every call, whose host time counts
def _blocks(shape: tuple[int, ...], *strides: tuple[int, ...]) -> list[Block]:
    kept = [n for n, size in enumerate(shape) if size != 1]
    shape, both = tuple(shape[n] for n in kept), [[stride[n] for n in kept] for stride in strides]
    inner, width = len(shape), 1
    while inner and all(stride[inner - 1] == width for stride in both):
        inner -= 1
        width *= shape[inner]
    outer, rows = inner, 1
    pitches = [stride[inner - 1] if inner else width for stride in both]
    while outer and all(stride[outer - 1] == rows * pitch for stride, pitch in zip(both, pitches, strict=True)):
        outer -= 1
        rows *= shape[outer]
    starts = itertools.product(*map(range, shape[:outer]))
    offsets = [[sum(n * step for n, step in zip(index, stride, strict=False)) for stride in both] for index in starts]
    return [Block(to, from_, pitches[0], pitches[1], width, rows) for to, from_ in offsets]


def copy(target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """Copy by a copy engine. torch's copy_ runs a kernel where either is strided."""
    size, runtime = target.element_size(), _runtime()
    for block in blocks(target, source):
        to, from_ = target.data_ptr() + block.target * size, source.data_ptr() + block.source * size
        width, end = block.width * size, (DEVICE_TO_DEVICE, stream.cuda_stream)
        if block.rows == 1:
            name, error = "cudaMemcpyAsync", runtime.cudaMemcpyAsync(to, from_, width, *end)
        else:
            pitches = block.target_pitch * size, block.source_pitch * size
            name = "cudaMemcpy2DAsync"
            error = runtime.cudaMemcpy2DAsync(to, pitches[0], from_, pitches[1], width, block.rows, *end)
        if error:
            runtime.cudaGetLastError()  # or the next kernel would be blamed
            raise RuntimeError(f"{name}, {block.rows} rows of {width} bytes: CUDA error {error}")


@functools.cache
def _runtime() -> Any:
    """The CUDA runtime that torch has loaded."""
    name = f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}"
    try:
        library = ctypes.CDLL(name)
        contiguous, strided = library.cudaMemcpyAsync, library.cudaMemcpy2DAsync
    except (OSError, AttributeError) as error:
        raise Unsupported(f"copies by the copy engines need {name}: {one_line(error)}") from None
    pointer, number = ctypes.c_void_p, ctypes.c_size_t
    contiguous.argtypes = [pointer, pointer, number, ctypes.c_int, pointer]
    strided.argtypes = [pointer, number, pointer, number, number, number, ctypes.c_int, pointer]
    return library
