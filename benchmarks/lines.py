"""A process that answers one line of JSON for each line of JSON. Both sides; only the standard library."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any


class Gone(Exception):
    """The process ended instead of answering."""


class Process:
    """A process that answers. It is started in a session of its own, so that Ctrl-C reaches only the one who asks."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,
            text=True,
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer. Raises Gone where there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        # One that has ended answers nothing, which is seen below.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise Gone(f"the process ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End it: it may be in the midst of something."""
        self._process.terminate()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer until there are no more requests. Whatever else is printed goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()
