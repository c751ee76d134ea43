"""Files that people name, read and written with errors that say which."""

import json
import tempfile
from pathlib import Path
from typing import Any

from risotto_zoo.errors import UserError
from risotto_zoo.files import write_atomically


def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises:
        UserError: If it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: not valid JSON") from None


def check_place(path: Path) -> None:
    """Make sure that a file can be written, before minutes are spent on what is to be written there.

    Raises:
        UserError: If its folder cannot be written, or it is a folder itself.
    """
    try:
        with tempfile.TemporaryFile(dir=next(place for place in path.absolute().parents if place.exists())):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")


def write(path: Path, content: str | bytes) -> None:
    """Write a file and the folders that it lies in, whole or not at all.

    Raises:
        UserError: If it cannot be written; what was there before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
