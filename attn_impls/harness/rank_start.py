"""How a rank of torchrun begins: meeting the others, its device, its silence. Without torchrun, how to get there."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from . import options, workers
from .rank_hooks import RankHooks
from .ranks import Outcome, Ranks, blamed, launched
from .session import Session

T = TypeVar("T")

HOW = "torchrun --nproc-per-node N -m pytest -m distributed"
# what only rank 0 may do: write files and compare with them
RANK_0_ONLY: dict[str, Any] = {
    "benchmark_json": None,
    "benchmark_save": None,
    "benchmark_autosave": None,
    "benchmark_compare": None,
    "benchmark_compare_fail": [],
    "benchmark_histogram": None,
    "xmlpath": None,
}
SAME_ORDER = {"randomly_reorganize": False, "random_order_bucket": "none"}  # of pytest-randomly and pytest-random-order
REORDERING = ("lfplugin", "nfplugin", "stepwiseplugin")  # of pytest's cache, which ranks would read while others write it
LOGS_KEPT = 64
MEETING_SECONDS = 60.0


def meet(config: pytest.Config) -> Ranks | None:
    """Under torchrun, meet the other ranks; None without it. Raises pytest.UsageError."""
    if not launched():
        config.pluginmanager.register(WithoutTorchrun(), "attention-without-torchrun")
        return None
    if int(os.environ["RANK"]):
        _quiet(config)
    for name, value in SAME_ORDER.items():
        if hasattr(config.option, name):
            setattr(config.option, name, value)
    for name in REORDERING:
        config.pluginmanager.set_blocked(name)
    try:
        timeout = options.read_options(config)["rank_timeout"]
    except pytest.UsageError:  # which all ranks will agree on, once they have met
        timeout = MEETING_SECONDS
    ranks = Ranks(timeout)
    agreed(ranks, lambda: _refuse_workers(config))
    return ranks


def _refuse_workers(config: pytest.Config) -> None:
    if workers.in_parallel(config):
        raise pytest.UsageError("pytest-xdist (-n) and torchrun do not go together: xdist's workers would all be one rank")


def agreed(ranks: Ranks | None, resolve: Callable[[], T]) -> T:
    """What `resolve` returns, if it raises pytest.UsageError on no rank; else the same UsageError on all."""
    if ranks is None:
        return resolve()
    mine, result = Outcome(), None
    try:
        result = resolve()
    except pytest.UsageError as error:
        mine = Outcome("failed", str(error))
    if failed := blamed(ranks.exchange(mine), "failed"):
        if ranks.rank:
            time.sleep(1.0)  # torchrun ends everybody at the first that leaves: let rank 0 say it
        raise pytest.UsageError(failed)
    return result  # type: ignore[return-value]


def connect(config: pytest.Config, session: Session) -> None:
    """Give each rank its device, make the process groups, and take over pytest's decisions."""
    ranks = session.ranks
    if ranks is None:
        return
    agreed(ranks, lambda: _take_device(session.device, ranks.local_rank))
    ranks.connect(session.device)
    hooks = RankHooks(config, session, ranks)
    config.pluginmanager.register(hooks, "attention-ranks")
    _own_tmp_path(config, ranks, hooks)


def _take_device(device: str, local_rank: int) -> None:
    if device != "cuda":
        return
    if local_rank >= torch.cuda.device_count():
        raise pytest.UsageError(
            f"more ranks than GPUs on this machine: give --nproc-per-node {torch.cuda.device_count()} at most, or --device cpu"
        )
    torch.cuda.set_device(local_rank)


def _quiet(config: pytest.Config) -> None:
    """Let this rank write to a log of its own, and to no other file."""
    folder = Path(config.rootpath) / ".benchmarks" / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("*.log"))[:-LOGS_KEPT]:
        old.unlink(missing_ok=True)
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-rank{os.environ['RANK']}.log"
    # pytest's reporter takes sys.stdout when it is made, which is after this
    sys.stdout = sys.stderr = (folder / name).open("w", encoding="utf-8", buffering=1)
    for option, value in RANK_0_ONLY.items():
        if hasattr(config.option, option):
            setattr(config.option, option, value)


def _own_tmp_path(config: pytest.Config, ranks: Ranks, hooks: RankHooks) -> None:
    """Put each rank's tmp_path below one folder that rank 0 names, so that no two ranks number and clean the same."""
    given = config.option.basetemp
    base = Path(ranks.decided(str(given or Path(tempfile.gettempdir()) / f"attn-impls-ranks-{secrets.token_hex(4)}")))
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    config.option.basetemp = base / f"rank{ranks.rank}"
    hooks.temporary = None if given else base


class WithoutTorchrun:
    """Leaves the distributed tests out, and says how to run them."""

    def __init__(self) -> None:
        self.left_out = False

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        gone = [item for item in items if item.get_closest_marker("distributed")]
        self.left_out = bool(gone)
        if gone:
            config.hook.pytest_deselected(items=gone)
            items[:] = [item for item in items if not item.get_closest_marker("distributed")]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.left_out:
            terminalreporter.write_line(f"distributed tests are left out; run them with: {HOW}")
