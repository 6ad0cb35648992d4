"""The command line. Thin: arguments in, library calls, tables and pictures out."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """The ``recurra`` command. Exits 0 when done, 1 when failed, 2 for wrong usage, 130 when interrupted."""
    # PyTorch's threads wait for one another in a loop; on a core that is needed elsewhere, for seconds (lab notes).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if sys.stdout is None:  # closed by the caller, who wants none
        sys.stdout = io.StringIO()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character still gets the rest.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors are told on stderr, in one line and without a traceback."""
    from cyclopts import CycloptsError

    from recurra.cli.app import app
    from recurra.cli.talk import complain
    from recurra.errors import ConfigError, RecurraError

    try:
        code = app(arguments, result_action="return_value", print_error=False, exit_on_error=False)
        sys.stdout.flush()
        return code or 0
    except CycloptsError as error:
        complain(f"{error}")
        command = " ".join(getattr(error, "command_chain", None) or ())
        complain(f"try: recurra {command + ' ' if command else ''}--help", label=None)
        return 2
    except ConfigError as error:
        complain(str(error))
        return 2
    except RecurraError as error:
        complain(str(error), label=None if hasattr(error, "exit_code") else "error")
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        complain("interrupted", label=None)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        complain("there is not enough memory for this model and batch: make hidden_size, batch_size or window smaller")
        return 1
    except OSError as error:
        complain(f"{error.filename or 'the operating system'}: {error.strerror or error}")
        return 1
