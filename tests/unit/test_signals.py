"""Signals reach the work whatever the main thread is doing."""

from __future__ import annotations

import subprocess
import sys

# With a handler that sets the event itself, this hangs within a few hundred rounds.
_ENDED_OFTEN = """
import os, random, signal, threading, time
from modelcask.cli.signals import stopping_on_signals

for _ in range(200):
    with stopping_on_signals() as stop:
        pause = random.random() / 1000
        sender = threading.Thread(target=lambda: (time.sleep(pause), os.kill(os.getpid(), signal.SIGTERM)))
        sender.start()
        while not stop.wait(0):
            pass
        sender.join()
print("ended")
"""


def test_a_signal_never_finds_the_main_thread_holding_what_it_needs() -> None:
    done = subprocess.run([sys.executable, "-c", _ENDED_OFTEN], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ended\n"


def test_a_second_interrupt_kills() -> None:
    stubborn = (
        "import time\nfrom modelcask.cli.signals import stopping_on_signals\n"
        "with stopping_on_signals() as stop:\n    print('go', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        process.send_signal(2)
        for _ in range(100):
            try:
                process.wait(0.1)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(2)
        assert process.returncode == -2
