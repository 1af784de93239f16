"""A child process that answers over a pipe, and whose failure is the parent's failure."""

from __future__ import annotations

import multiprocessing
import traceback
from typing import NamedTuple

from rlfast.demo.settings import DemoError


class Failed(NamedTuple):
    """What a worker sends when it ends with an exception."""

    trace: str


class Worker:
    """``target(channel, *args)`` in a fresh process; its own memory, its own patches."""

    def __init__(self, target, *args):
        context = multiprocessing.get_context("spawn")
        self._channel, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, target, args), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, message) -> None:
        self._channel.send(message)

    def receive(self):
        """The next message; DemoError if the process failed."""
        try:
            message = self._channel.recv()
        except EOFError:
            self._process.join()
            raise DemoError(f"a training process ended with code {self._process.exitcode}: out of memory?") from None
        if isinstance(message, Failed):
            raise DemoError(f"a training process failed:\n{message.trace}")
        return message

    def close(self) -> None:
        """End the process if it has not ended."""
        self._channel.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _run(channel, target, args) -> None:
    try:
        target(channel, *args)
    except EOFError:
        pass  # the parent is gone
    except Exception:  # whatever it was, the parent ends with it
        channel.send(Failed(traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        channel.close()
