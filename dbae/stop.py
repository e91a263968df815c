"""Requests to stop: a signal, or the end of the time that the job may take."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import TracebackType

# SLURM warns with SIGUSR1 (`--signal=USR1@300`). Code 143 says "run the same command again".
_EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
# The terminal or SLURM signals a whole group, and launchers pass the signal on to the same
# processes: what comes within this time is the same request.
_SAME_REQUEST_S = 2.0


class StopRequest:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C ask to stop instead of killing.

    A second signal, two seconds or more after the first, ends the process at once, also while it
    waits for other processes or writes to a disk that hangs: Python would handle signals only
    after such a wait, so a thread reads them from a pipe. Off the main thread, where signals
    cannot be handled, only the time limit counts.

    `reason`: why to stop ("SIGTERM", "--max_minutes 60"), None as long as there is no reason.
    `code`: the exit code that goes with it.

    Args:
        max_minutes: a reason to stop comes up this long after the start (0: never).
    """

    def __init__(self, max_minutes: float = 0) -> None:
        self.code = _EXIT_CODES[signal.SIGTERM]
        self._signal: str | None = None
        self._limit = f"--max_minutes {max_minutes:g}"
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")

    @property
    def reason(self) -> str | None:
        if self._signal is None and time.monotonic() > self._deadline:
            return self._limit
        return self._signal

    def __enter__(self) -> StopRequest:
        self._previous = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        # Only a signal that has a handler in Python is written to the pipe.
        self._previous = {s: signal.signal(s, lambda *_: None) for s in _EXIT_CODES}
        threading.Thread(target=self._watch, args=[self._pipe[0]], daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])  # ends the thread

    def _watch(self, pipe: int) -> None:
        first = float("inf")
        while received := os.read(pipe, 1):
            number = signal.Signals(received[0])
            if number not in _EXIT_CODES:
                continue
            now = time.monotonic()
            if self._signal is None:
                first, self.code, self._signal = now, _EXIT_CODES[number], number.name
            elif now - first >= _SAME_REQUEST_S:
                os.write(2, b"stopped at once; the last checkpoint is whole\n")
                os._exit(_EXIT_CODES[number])
        os.close(pipe)
