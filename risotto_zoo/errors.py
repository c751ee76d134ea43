"""Errors for people: one line that names the culprit and the mend, exit code 2, no traceback."""

import difflib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from functools import wraps


class UserError(Exception):
    """Something the user can mend. The message stands alone: what is wrong, where, and what to do."""


class NoWeights(UserError, RuntimeError):
    """A net that has no pretrained weights; a RuntimeError as timm's own is, for those who catch that."""


class HubError(UserError, OSError):
    """What the Hub, or the way to it, refuses; an OSError as the errors of its client are, for those who catch them."""


def did_you_mean(word: str, known: Iterable[str], count: int = 3) -> str:
    """`; did you mean 'a' or 'b'?` with the nearest of the known words, or an empty string if none is near."""
    near = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def exits_cleanly(main: Callable[[], int | None]) -> Callable[[], None]:
    """Decorate a command: a UserError or OSError is one line on stderr and exit code 2, Ctrl-C exit code 130.

    A KeyboardInterrupt of another signal bears its number.
    """

    @wraps(main)
    def command() -> None:
        for stream in (sys.stdout, sys.stderr):  # names of files and classes may hold what the terminal cannot show
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            code = main() or 0
            sys.stdout.flush()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except BrokenPipeError:  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except OSError as error:  # a place that cannot be read or written
            print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt as interrupt:
            print("interrupted", file=sys.stderr)
            numbers = [number for number in interrupt.args if isinstance(number, int)]
            code = 128 + (numbers or [signal.SIGINT])[0]
        sys.exit(code)

    return command
