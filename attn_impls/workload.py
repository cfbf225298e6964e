"""What is computed: the sizes, mask and dtype of one attention problem, its id, its exact FLOPs and bytes."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from decimal import Decimal

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DIRECTIONS = ("forward", "backward", "forward+backward")  # "backward" is the gradients alone

_ID = re.compile(
    r"b(?P<batch>\d+)-h(?P<heads>\d+)(kv(?P<kv_heads>\d+))?"
    r"-(s(?P<s>\d+)|q(?P<q_len>\d+)kv(?P<kv_len>\d+))"
    r"-d(?P<head_dim>\d+)(v(?P<v_head_dim>\d+))?"
    r"(?P<causal>-causal)?(-win(?P<window>\d+))?(-cap(?P<softcap>\d+(\.\d+)?))?(-scale(?P<scale_dim>\d+))?"
    rf"-(?P<dtype>{'|'.join(DTYPES)})"
)
ID_GRAMMAR = "b1-h32[kv8]-s8192|q1kv8192-d128[v64][-causal[-win4096]][-cap50][-scale144]-bf16|fp16|fp32"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One attention problem: softmax(mask(cap(q·kᵀ·scale)))·v.

    Shapes (layout "bhsd"): q [batch, heads, q_len, head_dim], k [batch, kv_heads, kv_len, head_dim],
    v [batch, kv_heads, kv_len, v_head_dim], out [batch, heads, q_len, v_head_dim]. Query head h reads KV head
    h // (heads // kv_heads).

    `causal` is aligned bottom-right: query i sees the keys j ≤ i + kv_len − q_len. `window` counts the query's own
    position and needs `causal`: query i sees the last `window` of those keys. 0 turns a window or a softcap off.
    The scale is scale_dim^-½. Raises ValueError on sizes that make no problem.
    """

    batch: int
    heads: int
    kv_heads: int = None  # type: ignore[assignment]  # derived: heads
    q_len: int
    kv_len: int = None  # type: ignore[assignment]  # derived: q_len
    head_dim: int
    v_head_dim: int = None  # type: ignore[assignment]  # derived: head_dim
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    scale_dim: int = None  # type: ignore[assignment]  # derived: head_dim
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        derived = {"kv_heads": "heads", "kv_len": "q_len", "v_head_dim": "head_dim", "scale_dim": "head_dim"}
        for field, source in derived.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, getattr(self, source))
        for field in ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim", "scale_dim"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{field} is {value!r}: give a whole number above 0")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) is not divisible by kv_heads ({self.kv_heads}): "
                f"each KV head serves the same number of query heads; give kv_heads one of {_divisors(self.heads)}"
            )
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal is {self.causal!r}: give True or False")
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 0:
            raise ValueError(f"window is {self.window!r}: give the number of keys a query sees, or 0 for no window")
        if self.window and not self.causal:
            raise ValueError(f"window is {self.window} without causal: a window counts back from the query's position")
        number = isinstance(self.softcap, (int, float)) and not isinstance(self.softcap, bool)
        if not (number and 0 <= self.softcap <= sys.float_info.max):
            raise ValueError(f"softcap is {self.softcap!r}: give a number above 0, or 0 for none")
        object.__setattr__(self, "softcap", float(self.softcap))
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"dtype is {self.dtype!r}: give one of {', '.join(map(str, DTYPE_NAMES))}")

    def __str__(self) -> str:
        kv_heads = f"kv{self.kv_heads}" if self.kv_heads != self.heads else ""
        lengths = f"s{self.q_len}" if self.kv_len == self.q_len else f"q{self.q_len}kv{self.kv_len}"
        v_head_dim = f"v{self.v_head_dim}" if self.v_head_dim != self.head_dim else ""
        parts = [f"b{self.batch}", f"h{self.heads}{kv_heads}", lengths, f"d{self.head_dim}{v_head_dim}"]
        parts += ["causal"] if self.causal else []
        parts += [f"win{self.window}"] if self.window else []
        parts += [f"cap{Decimal(repr(self.softcap)):f}".removesuffix(".0")] if self.softcap else []
        parts += [f"scale{self.scale_dim}"] if self.scale_dim != self.head_dim else []
        return "-".join([*parts, DTYPE_NAMES[self.dtype]])

    @classmethod
    def parse(cls, text: str) -> Workload:
        """The workload of an id: `Workload.parse(str(w)) == w`. Raises ValueError on anything else."""
        match = _ID.fullmatch(text)
        if not match:
            raise ValueError(f"malformed workload id {text!r}: ids look like {ID_GRAMMAR}")
        fields = match.groupdict()
        s = fields.pop("s")
        if s is not None:
            fields["q_len"] = fields["kv_len"] = s
        dtype, softcap, causal = fields.pop("dtype"), fields.pop("softcap"), fields.pop("causal")
        numbers = {name: int(value) for name, value in fields.items() if value is not None}
        try:
            w = cls(**numbers, causal=bool(causal), softcap=float(softcap or 0), dtype=DTYPES[dtype])
        except ValueError as error:
            raise ValueError(f"workload id {text!r}: {error}") from None
        if str(w) != text:
            raise ValueError(f"workload id {text!r} is not in its short form: write {str(w)!r}")
        return w

    def replace(self, **changes: object) -> Workload:
        """A copy with some fields changed; fields that were derived from a changed one follow it."""
        for field, source in {"kv_heads": "heads", "kv_len": "q_len", "v_head_dim": "head_dim", "scale_dim": "head_dim"}.items():
            if source in changes and field not in changes and getattr(self, field) == getattr(self, source):
                changes[field] = changes[source]
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def scale(self) -> float:
        return self.scale_dim**-0.5

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def offset(self) -> int:
        """Query i's own position among the keys is i + offset."""
        return self.kv_len - self.q_len

    @property
    def pairs(self) -> int:
        """Unmasked (query, key) pairs of one head, exactly."""
        if not self.causal:
            return self.q_len * self.kv_len
        unwindowed = _clamped_sum(self.offset + 1, self.q_len)
        return unwindowed - (_clamped_sum(self.offset + 1 - self.window, self.q_len) if self.window else 0)

    @property
    def seen_keys(self) -> int:
        """Keys that at least one query sees."""
        if not self.causal:
            return self.kv_len
        first = max(0, self.offset + 1 - self.window) if self.window else 0
        return self.kv_len - first

    @property
    def blind_rows(self) -> int:
        """Queries that see no key at all (causal with q_len > kv_len); their output is zero."""
        return max(0, -self.offset) if self.causal else 0

    def flops(self, direction: str = "forward") -> int:
        """FLOPs over the unmasked pairs, 2 per multiply-add, softmax not counted.

        Backward counts five products (recomputed scores, dV, dP, dQ, dK), as FlashAttention's benchmarks do:
        2.5 × forward where head_dim = v_head_dim. "forward+backward" is the sum of the two.
        """
        if direction == "forward+backward":
            return self.flops("forward") + self.flops("backward")
        qk, pv = self.head_dim, self.v_head_dim
        per_pair = {"forward": qk + pv, "backward": 3 * qk + 2 * pv}[direction]
        return 2 * self.batch * self.heads * self.pairs * per_pair

    def bytes(self, direction: str = "forward") -> int:
        """The fewest bytes through device memory: each input that is seen read once, each output written once.

        "forward+backward" is the sum of the two passes.
        """
        if direction == "forward+backward":
            return self.bytes("forward") + self.bytes("backward")
        q = self.batch * self.heads * self.q_len * self.head_dim
        out = self.batch * self.heads * self.q_len * self.v_head_dim
        k = self.batch * self.kv_heads * self.seen_keys * self.head_dim
        v = self.batch * self.kv_heads * self.seen_keys * self.v_head_dim
        dk_dv = self.batch * self.kv_heads * self.kv_len * (self.head_dim + self.v_head_dim)  # zero where nobody looks
        # backward reads q, k, v, out, dout and writes dq, dk, dv
        elements = {"forward": q + k + v + out, "backward": 2 * q + k + v + 2 * out + dk_dv}[direction]
        return elements * self.dtype.itemsize

    def shapes(self, layout: str = "bhsd") -> dict[str, tuple[int, int, int, int]]:
        """The shapes of q, k, v and out in a layout, "bhsd" or "bshd"."""
        sizes = {
            "q": (self.heads, self.q_len, self.head_dim),
            "k": (self.kv_heads, self.kv_len, self.head_dim),
            "v": (self.kv_heads, self.kv_len, self.v_head_dim),
            "out": (self.heads, self.q_len, self.v_head_dim),
        }
        if layout == "bhsd":
            return {name: (self.batch, h, s, d) for name, (h, s, d) in sizes.items()}
        assert layout == "bshd", layout
        return {name: (self.batch, s, h, d) for name, (h, s, d) in sizes.items()}

    def mask(self, device: torch.device | str, rows: torch.Tensor | None = None) -> torch.Tensor | None:
        """True where a query sees a key, [q_len or len(rows), kv_len]; None where every query sees every key."""
        if not self.causal:
            return None
        i = torch.arange(self.q_len, device=device) if rows is None else rows.to(device)
        i, j = i[:, None] + self.offset, torch.arange(self.kv_len, device=device)[None, :]
        return (j <= i) & (j > i - self.window) if self.window else j <= i

    def keys_seen(self, rows: slice) -> slice:
        """The keys from the first to the last that any of some neighbouring queries sees; one where they see none."""
        if not self.causal:
            return slice(0, self.kv_len)
        last = min(max(rows.stop + self.offset, 1), self.kv_len)
        first = rows.start + self.offset + 1 - self.window if self.window else 0
        return slice(min(max(first, 0), last - 1), last)


def _clamped_sum(first: int, count: int) -> int:
    """Σ max(0, first + i) for i in 0 … count − 1."""
    last = first + count - 1
    if last <= 0:
        return 0
    low = max(1, first)
    return (low + last) * (last - low + 1) // 2


def _divisors(n: int) -> str:
    divisors = [d for d in range(1, min(n, 4096) + 1) if n % d == 0]
    return ", ".join(map(str, divisors[:12]))
