"""The ranks of one run under torchrun: how they meet, agree on every step, and learn which of them is lost.

Steps are agreed through torchrun's store, where a rank that does not come can be named; tensors go through two groups: the
data group (NCCL or gloo), which the strategies use, and a gloo control group with a longer timeout, which times rounds.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
import torch.distributed as dist

from ..registry import Unsupported, one_line
from .case import Broken, CaseFailed, DeviceLost, OutOfMemory

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a rank
POLL_SECONDS = 0.05
LOST = "lost"  # the store's key for the first sticky CUDA error
LOST_SECONDS = 3.0  # without a sign of life, until a rank takes it that it waits for the device that is lost
# in what gloo and NCCL say where another rank went away
PEER_SIGNS = ("Connection closed by peer", "Timed out", "timed out", "Connection reset", "Broken pipe")
# Shares of --rank-timeout. On gloo a collective fails first, then a rank that is stuck says where it stands. NCCL ends the
# process of a collective that timed out, so there the rank speaks first.
DATA_SHARE = {"cpu": 0.6, "cuda": 0.8}
LEAST_SHARE = 0.25  # that a rank waits for the others, however late it comes itself
PULSE_SHARE = {"cpu": 0.8, "cuda": 0.6}

T = TypeVar("T")


class RankLost(pytest.exit.Exception):  # type: ignore[name-defined]  # mypy sees a function
    """Another rank is gone or does not come: nothing can be agreed any more, so this rank's run ends."""

    def __init__(self, message: str):
        super().__init__(message, returncode=1)


class Outcome(NamedTuple):
    """How a guarded phase ended on one rank: "passed", "skipped" or "failed", why, and the class of a failure."""

    kind: str = "passed"
    text: str = ""
    failure: type[CaseFailed] = CaseFailed


GRAVEST = (DeviceLost, Broken, OutOfMemory, CaseFailed)  # what a failure that is not the same on all ranks is on all of them


def launched() -> bool:
    """Whether torchrun (or something that speaks its language) started this process as one of several ranks."""
    return all(name in os.environ for name in LAUNCHED)


def launched_by() -> list[str]:
    """The words before "pytest" in a command that starts this run again."""
    return ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "N"), "-m"] if launched() else []


class Ranks:
    """This rank among the others. `size` may be 1."""

    def __init__(self, timeout: float):
        """timeout: seconds that ranks wait for one another. Meets the others at the store."""
        self.timeout = timeout
        self.device = "cpu"
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        self.phase = "start"
        self.poison = ""  # why no collective can be trusted any more
        self.ending = ""  # why this process was told to end
        self._step = 0
        self._beaten = self._agreed = time.monotonic()
        self._store, _, _ = next(dist.rendezvous("env://", timeout=self._delta(timeout)))
        self.store = dist.PrefixStore("attn_impls", self._store)
        self.processes: list[tuple[str, int]] = []
        self.processes = self.exchange((socket.gethostname(), os.getpid()))

    @staticmethod
    def _delta(seconds: float) -> datetime.timedelta:
        return datetime.timedelta(seconds=seconds)

    def connect(self, device: str) -> None:
        """Make the process groups for a type of device, whose current device is this rank's."""
        self.device = device
        # or a gather beside a kernel that fills the GPU would start only when that kernel ends
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
        self.backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore("data", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=self._delta(self.timeout * DATA_SHARE[device]),
            device_id=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None,
        )
        self.control = dist.new_group(backend="gloo", timeout=self._delta(self.timeout))
        self._pulse = threading.Thread(target=self._watch_pulse, args=(self.timeout * PULSE_SHARE[device],), daemon=True)
        self._pulse.start()

    def beat(self) -> None:
        """A sign of life."""
        self._beaten = time.monotonic()

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Raises RankLost, naming the culprit, if one is gone or does not come in time."""
        self._step += 1
        keys = [f"{self._step}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], pickle.dumps(value))  # type: ignore[arg-type]  # its stub knows str only
        # counted from the last agreement, for a rank that has itself waited long for a collective; but never hurried
        deadline = max(self._agreed + self.timeout, time.monotonic() + LEAST_SHARE * self.timeout)
        pause = 0.0
        while not self.store.check(keys):
            self.beat()
            if pause > POLL_SECONDS:
                self._give_up_if_lost(keys, deadline)
            time.sleep(pause)
            pause = min(pause * 1.5 + 1e-5, 2 * POLL_SECONDS)
        values = [pickle.loads(self.store.get(key)) for key in keys]
        if self._step > 1:  # all have come here, so all have read the step before
            self.store.delete_key(f"{self._step - 1}/{self.rank}")
        self._agreed = self._beaten = time.monotonic()
        return values

    def decided(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return self.exchange(value if self.rank == 0 else None)[0]

    def gather_round(self, *values: float) -> list[list[float]]:
        """Every rank's values of a round, by rank: one small gather of the control group."""
        self.beat()
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.control)
        self._agreed = time.monotonic()
        return [one.tolist() for one in found]

    def align(self) -> None:
        """Leave together, as near as the control group can."""
        dist.barrier(group=self.control)

    def guarded(self, what: str, action: Callable[[], T], collective: bool = False) -> T:
        """Run a phase on every rank, then go on only if it passed on all.

        A phase that is not `collective` must not communicate. A collective phase that did not fail alike on all ranks leaves
        them at different points of their collectives, so it poisons the rest of the run. Raises Unsupported or CaseFailed.
        """
        __tracebackhide__ = True
        if self.poison:
            raise CaseFailed(self.poison)
        self.phase = what
        self.beat()
        mine, result = Outcome(), None
        try:
            result = action()
        except Unsupported as error:
            mine = Outcome("skipped", str(error))
        except CaseFailed as error:
            mine = Outcome("failed", str(error), type(error))
        except pytest.exit.Exception:
            raise
        except (Exception, SystemExit) as error:
            failure = DeviceLost if self._device_lost() else CaseFailed
            mine = Outcome("failed", f"{one_line(error)}\n{traceback.format_exc()}", failure)
            traceback.clear_frames(error.__traceback__)
        if mine.failure is DeviceLost:
            self.store.set(LOST, f"rank {self.rank}: {mine.text}")  # for ranks that wait for this one's device
        outcomes = self.exchange(mine)
        failed = blamed(outcomes, "failed")
        if failed and collective and len({outcome.text for outcome in outcomes}) > 1:
            self._poisoned_by(what, failed)
        self.suspect(what, outcomes)
        if failed:
            classes = {outcome.failure for outcome in outcomes if outcome.kind == "failed"}
            gravest = next(failure for failure in GRAVEST if failure in classes)
            if gravest is DeviceLost:
                self.poison = f"a CUDA device is lost in {what}: {failed.splitlines()[0]}"
            raise gravest(f"{failed}\n(in {what})" if "\n" in failed else f"{failed} (in {what})")
        if skipped := blamed(outcomes, "skipped"):
            raise Unsupported(skipped)
        return result  # type: ignore[return-value]

    def _device_lost(self) -> bool:
        """Whether this rank's device has a sticky error. Does not wait: a collective may be waiting for another rank."""
        if self.device != "cuda":
            return False
        try:
            torch.cuda.current_stream().query()
        except Exception:
            return True
        return False

    def suspect(self, what: str, outcomes: list[Outcome]) -> None:
        """Poison the rest of the run where a failure says that a collective broke."""
        broken = [outcome.text for outcome in outcomes if any(sign in outcome.text for sign in PEER_SIGNS)]
        if broken and not self.poison:
            self._poisoned_by(what, blamed(outcomes, "failed"))

    def _poisoned_by(self, what: str, failed: str) -> None:
        self.poison = f"a collective failed in {what} ({failed.splitlines()[0]}): what follows could pair with its remains"

    def leave(self, why: str) -> None:
        """Tell the ranks that wait for this one, now or later, that it will not come."""
        with contextlib.suppress(RuntimeError):  # the store is gone: nobody is left to be told
            self.store.set(f"left/{self.rank}", why)

    def statement(self, rank: int) -> str:
        """What a rank said when it left, or "" if it said nothing."""
        key = f"left/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def close(self, clean: bool) -> None:
        """Wait until all ranks are done, rank 0's files being written, then leave the groups."""
        if not clean:
            return
        self.phase = "end of the run"
        self.exchange(None)
        self._beaten = float("inf")
        if dist.is_initialized():
            dist.destroy_process_group(self.control)
            dist.destroy_process_group()

    def gone(self) -> dict[int, str]:
        """The ranks known to be gone, and how that is known."""
        found = {}
        for rank in range(self.size):
            if rank != self.rank and (why := self.statement(rank) or self._dead(rank)):
                found[rank] = why
        return found

    def _dead(self, rank: int) -> str:
        host, pid = self.processes[rank] if self.processes else ("", 0)
        if host != socket.gethostname() or alive(pid):
            return ""
        return f"its process {pid} is gone (torchrun's report below has its signal or exit code)"

    def _give_up_if_lost(self, keys: list[str], deadline: float) -> None:
        missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        gone = {rank: why for rank, why in self.gone().items() if rank in missing}
        late = time.monotonic() > deadline
        if gone or late or self.ending:
            if self.ending and not gone:
                time.sleep(1.0)  # torchrun ends everybody at the first death: let the dead be seen
                gone = {rank: why for rank, why in self.gone().items() if rank in missing}
            silent = dict.fromkeys(missing, f"gave no sign for {self.timeout:g} s") if late else {}
            culprits = gone or silent
            told = "; ".join(f"rank {rank}: {why}" for rank, why in culprits.items()) or self.ending
            self.leave(f"ended because of rank {', '.join(map(str, culprits))}" if culprits else told)
            raise RankLost(f"in {self.phase}: {told}")

    def _watch_pulse(self, limit: float) -> None:
        """End a rank that is stuck, after it has said where: its main thread may be in a call that never returns."""
        main = threading.main_thread().ident
        while time.monotonic() - self._beaten < limit:
            time.sleep(min(1.0, limit / 10))
            if time.monotonic() - self._beaten > LOST_SECONDS and self.store.check([LOST]):
                self.on_stall(f"waits in {self.phase} for a device that is lost. {self.store.get(LOST).decode()}")
        frame = sys._current_frames().get(main)  # type: ignore[arg-type]
        where = "".join(traceback.format_stack(frame)[-6:])
        self.on_stall(f"stuck for {limit:g} s in {self.phase} (if that is no fault, raise --rank-timeout):\n{where}")

    def on_stall(self, why: str) -> None:
        """Replaced by whoever has more to save."""
        self.leave(why)
        os._exit(1)


def blamed(outcomes: list[Outcome], kind: str) -> str:
    """The ranks whose outcome is of this kind, with their reasons; one that all share stands once. "" if there is none."""
    reasons = {rank: outcome.text for rank, outcome in enumerate(outcomes) if outcome.kind == kind}
    if not reasons:
        return ""
    if len(reasons) == len(outcomes) and len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    # a rank whose collective broke is a victim where another has a reason of its own
    own = {rank: text for rank, text in reasons.items() if not _of_a_peer(text)} or reasons
    return "\n".join(f"rank {rank}: {text}" for rank, text in own.items())


def _of_a_peer(text: str) -> bool:
    first = text.splitlines()[0] if text else ""
    return any(sign in first for sign in PEER_SIGNS)


def alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended and was not yet waited for does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # no /proc, or somebody else's process
        return True
