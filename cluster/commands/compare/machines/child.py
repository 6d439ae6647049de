"""Runs an adapeft command that is interrupted, as by Ctrl-C, once its standard input is closed.

The parent holds the other end: a command never outlives the process that started it, however that process ended, and
so keeps no lock on a run's folder that another machine is to resume.
"""

from __future__ import annotations

import os
import signal
import threading


def _interrupt_when_closed() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock would disturb the end of the interpreter
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    threading.Thread(target=_interrupt_when_closed, daemon=True).start()
    from adapeft.__main__ import main

    main()
