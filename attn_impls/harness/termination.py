"""A SIGTERM that is noticed at once, even while the main thread sits in a collective that will never end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable

GRACE_SECONDS = 5.0  # torchrun waits 30 s between SIGTERM and SIGKILL


class Termination:
    """Runs `told` in a thread when SIGTERM comes, and `last_words` if the process has not finished by itself soon after.

    Python runs its signal handlers in the main thread only, between bytecodes. What C does at once is write the signal's
    number to the wake-up file descriptor, so a thread reads that.
    """

    def __init__(self, told: Callable[[], None], last_words: Callable[[], None]):
        self.told, self.last_words = told, last_words
        self.finished = threading.Event()
        self._reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget)
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        while os.read(self._reading, 1) != bytes([signal.SIGTERM]):
            pass
        self.told()
        if self.finished.wait(GRACE_SECONDS):
            return
        try:
            self.last_words()
        finally:
            os._exit(128 + signal.SIGTERM)


def _forget() -> None:
    """In a forked child: a SIGTERM to it must end it, and say nothing to its parent."""
    with contextlib.suppress(ValueError):  # forked from a thread
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
