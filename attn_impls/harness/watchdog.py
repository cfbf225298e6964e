"""Ends a run whose case hangs: a kernel that never returns cannot be interrupted, so its process must go."""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Callable
from typing import NoReturn

GRACE_SECONDS = 10.0  # for a hang that holds the interpreter's lock, where no thread of ours can run


class Watchdog:
    """Calls `on_hang(case)` from a thread when a case outlasts the timeout, then ends the process with exit code 1."""

    def __init__(self, timeout: float, on_hang: Callable[[str], None], backstop: bool = True):
        """backstop: whether faulthandler's one timer is ours to take (pytest's faulthandler_timeout uses it too)."""
        self.timeout, self.on_hang, self.backstop = timeout, on_hang, backstop
        self.stderr = os.dup(2)  # the real one: pytest captures 2 while a test runs

    def start(self, case: str) -> None:
        self.timer = threading.Timer(self.timeout, self._bark, [case])
        self.timer.daemon = True
        self.timer.start()
        if self.backstop:
            faulthandler.dump_traceback_later(self.timeout + GRACE_SECONDS, exit=True, file=self.stderr)

    def stop(self) -> None:
        self.timer.cancel()
        if self.backstop:
            faulthandler.cancel_dump_traceback_later()

    def say(self, text: str) -> None:
        os.write(self.stderr, f"{text}\n".encode())

    def _bark(self, case: str) -> NoReturn:
        try:
            self.say(f"\n\nHUNG: {case} gave no result within {self.timeout:g} s (--case-timeout). The run ends here.")
            faulthandler.dump_traceback(file=self.stderr)
            self.on_hang(case)
        finally:
            os._exit(1)
