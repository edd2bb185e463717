"""SIGTERM and Ctrl-C while runs train."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

from rlx.distributed import several, told_to_stop


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request that the loop sees at the epoch's end. A second Ctrl-C interrupts.

    Of several processes all stop at the same epoch's end when one of them is told to. There SIGTERM is jax's, which
    tells the others; Ctrl-C is passed on as such.
    """

    def __init__(self, quiet: bool):
        self.requested = False
        self._told = False  # of several processes: the others may not know yet
        self._quiet = quiet

    def __enter__(self) -> StopSignal:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            taken = (signal.SIGINT,) if several() else (signal.SIGTERM, signal.SIGINT)
            self._previous = {s: signal.signal(s, self._request) for s in taken}
        return self

    def look(self) -> None:
        """Of several processes, sets `requested` where all are to stop at the end of this epoch. On every process."""
        if several() and told_to_stop():
            self.requested = True
            self._say("a process was told to stop")

    def _request(self, number: int, frame: Any) -> None:
        if (self.requested or self._told) and number == signal.SIGINT:
            raise KeyboardInterrupt
        if several():
            self._told = True
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.requested = True
            self._say(signal.Signals(number).name)

    def _say(self, why: str) -> None:
        if not self._quiet:
            # Not through the stream: it may be in the middle of a line, and refuses to be entered twice.
            with contextlib.suppress(OSError):
                os.write(2, f"{why}: saving at the end of this epoch, then stopping\n".encode())

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
            outer = getattr(handler, "__self__", None)
            if self.requested and isinstance(outer, StopSignal):  # around several runs
                outer.requested = True
