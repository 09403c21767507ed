"""``python -m dfed``."""

import atexit
import contextlib
import gc
import os
import sys
import threading

_EVERY = 100_000, 20, 20  # allocations between two looks for cycles, and such looks between two deeper ones


def start() -> None:
    """Run the command line, and end the process with its status.

    A plan is a matter of seconds, and nearly all that is made for it stays to the end: to look that through as often as Python
    does by itself takes a quarter of the time, and to take it apart before the end half a second. Threads are waited for, and
    what is registered with ``atexit`` runs; a file that a model of one's own leaves open is not flushed.
    """
    plans = sys.argv[1:2] == ["plan"]
    if plans:
        gc.set_threshold(*_EVERY)
    from dfed.cli import main

    status = main()
    if plans:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, or it is closed
                stream.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    start()
