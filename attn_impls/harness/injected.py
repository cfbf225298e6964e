"""Implementations that do a known share of their work twice: what the gate's false alarms and its power are measured with.

python -m attn_impls gate --prove sdpa,handcrafted -- --workload b100-h2-s64-d64-fp32
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ..registry import REGISTRY, Implementation, Kernel, Unsupported, discover
from ..workload import Workload
from .evidence import INCONCLUSIVE, REGRESSED, upper_bound
from .pairing import Comparison, Row, percent

SHARES = (0, 2, 5, 10)  # percent of the batch that a slowed kernel computes twice
FILE = """from attn_impls.harness import injected

injected.register({names!r}, slowed={slowed})
"""


def register(names: list[str], slowed: bool) -> None:
    """Register `<name>-plus<share>` for every share: as they are, or (slowed) with that much more work."""
    known = discover()
    for name in names:
        for share in SHARES:
            build = _builder(known[name], share if slowed else 0)
            REGISTRY[f"{name}-plus{share}"] = replace(known[name], name=f"{name}-plus{share}", build=build, lse_builder=None)


def _builder(original: Implementation, share: int) -> Callable[[Workload], Kernel]:
    def build(w: Workload) -> Kernel:
        kernel = original(w)
        extra, rest = divmod(share * w.batch, 100)
        if rest:
            raise Unsupported(f"{share} % of a batch of {w.batch} is no whole number: give a multiple of 100")
        if not extra:
            return kernel
        again = original(w.replace(batch=extra))
        return lambda q, k, v: (kernel(q, k, v), again(q[:extra], k[:extra], v[:extra]))[0]

    return build


def write(names: list[str], folder: Path) -> tuple[str, str]:
    """The two --impl files that register `names`. Raises ValueError for a name that there is not."""
    known = discover()
    for name in names:
        if name not in known:
            raise ValueError(f"--prove {name!r}: no such implementation; see python -m attn_impls list")
    files = folder / "as_they_are.py", folder / "slowed.py"
    for path, slowed in zip(files, (False, True), strict=True):
        path.write_text(FILE.format(names=names, slowed=slowed), encoding="utf-8")
    return str(files[0]), str(files[1])


def rates(found: Comparison) -> Iterator[str]:
    """How many cases failed, by the share of work that was added."""
    for share in SHARES:
        rows = [row for row in found.rows if row.key.implementation.endswith(f"-plus{share}") and row.evidence]
        if rows:
            yield _rate(share, rows)


def _rate(share: int, rows: list[Row]) -> str:
    failed, open_ = (sum(row.verdict == verdict for row in rows) for verdict in (REGRESSED, INCONCLUSIVE))
    changes = [row.evidence.change for row in rows if row.evidence]
    bound = f" (95 % bound {100 * upper_bound(failed, len(rows)):.2g} %)" if share == 0 else ""
    return (
        f"+{share} % work: {failed} of {len(rows)} cases failed{bound}, {open_} inconclusive; "
        f"measured {percent(statistics.median(changes))}, from {percent(min(changes))} to {percent(max(changes))}"
    )
