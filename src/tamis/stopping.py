"""Ctrl-C and SIGTERM: they end the process at once, or at the next point at which nothing is lost."""

import os
import signal
from typing import Any

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(BaseException):
    """The process was asked to end. No `Exception`, so that whoever handles errors on the way lets it through.

    Attributes:
        exit_code: 130 for Ctrl-C, 143 for SIGTERM, as shells have it.
    """

    def __init__(self, signum: int, hint: str = ""):
        super().__init__(f"stopped by {_NAMES[signal.Signals(signum)]}{hint}")
        self.signum, self.exit_code = signum, 128 + signum


class StopSignals:
    """Within it Ctrl-C and SIGTERM raise `Stopped`: at once, or by `release` once `hold` was called. Main thread only.

    A second Ctrl-C does not wait. SIGTERM may come twice: a launcher passes on what its own processes get as well.

    Attributes:
        received: the first signal that has come.
        hint: what `Stopped` says of the work that is being done.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.hint = ""
        self._is_held = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for signum in _NAMES:
            if signal.getsignal(signum) != signal.SIG_IGN:  # nohup and the like want it ignored
                self._before[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *error: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def hold(self) -> None:
        """From now on a signal is only noted, until `release`."""
        self._is_held = True

    def release(self) -> None:
        """Stop now if a signal was noted, and at once if one comes later.

        Raises:
            Stopped: one was noted.
        """
        self._is_held = False
        if self.received:
            raise Stopped(self.received, self.hint)

    def _on_signal(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker that was forked: no stack of ours to unwind
            os._exit(128 + signum)
        is_first = self.received is None
        self.received = self.received or signum
        if not self._is_held or (signum == signal.SIGINT and not is_first):
            raise Stopped(self.received, self.hint)
        if is_first:  # not by a logger: the signal may have come while one was writing
            os.write(
                2, f"\n{_NAMES[signal.Signals(signum)]}: stopping after this step, Ctrl-C stops at once\n".encode()
            )
