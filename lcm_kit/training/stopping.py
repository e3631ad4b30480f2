"""SIGTERM and SIGINT as a wish: finish this step, save, leave. A machine that is taken back loses nothing."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator

from lcm_kit.training.processes import largest, say

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable(accelerator: Accelerator) -> Iterator[Callable[[], int]]:
    """Within the block the first SIGTERM or SIGINT is noted and the next one acts as it did before.

    Yields `asked() -> int`, which all processes must call at the same place: the largest number of a signal
    that any of them has got, the same on each; 0 if there was none. Outside the main thread, where Python
    takes no signals, nothing is changed.
    """
    got: int = 0
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        nonlocal got
        got = int(number)
        for known, handler in before.items():
            signal.signal(known, handler)
        if accelerator.is_main_process:  # written directly: the signal may have come amid a print
            os.write(2, b"\nstopping: this step is finished and saved first; a second signal stops at once\n")

    def asked() -> int:
        if accelerator.num_processes == 1:
            return got
        return largest(got)

    try:
        if threading.current_thread() is threading.main_thread():
            # Python says None of a handler that it did not set itself.
            before = {each: signal.getsignal(each) or signal.SIG_DFL for each in _SIGNALS}
            for each in _SIGNALS:
                signal.signal(each, note)
        yield asked
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)


def leave(accelerator: Accelerator, run: Path, number: int, step: int, steps: int) -> NoReturn:
    """End the process after `step` was saved, as signal `number` asked.

    Raises `KeyboardInterrupt` for SIGINT and `SystemExit` with 143 for SIGTERM, as shells count.
    """
    say(accelerator, f"{run}: stopped and saved after step {step} of {steps}; the same command continues")
    accelerator.end_training()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
