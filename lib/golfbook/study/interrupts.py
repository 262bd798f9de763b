"""Ctrl-C and its relatives as a count: what is being stopped in order is not broken off by the next press."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

ONE_PRESS = 0.1  # seconds; ``timeout`` and some shells send a signal both to a process and to its group


class Interrupts:
    """Counts Ctrl-C, SIGTERM and SIGHUP, which then break off nothing by themselves; used by ``with``.

    A hang-up counts once: a terminal that closes may send several. What is ignored already, as under nohup, stays
    ignored. Python hears of signals in its main thread only; used in another thread it counts nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        self._last = float("-inf")
        self._previous: dict[str, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[name] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._previous.items():
            signal.signal(getattr(signal, name), handler)

    def _heard(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self.count == 0 or (now - self._last > ONE_PRESS and signal.Signals(number).name != "SIGHUP"):
            self.count += 1
            self._last = now
