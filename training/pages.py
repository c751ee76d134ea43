"""Generated files of the checkout: what of them is stale, and writing that."""

import sys
from pathlib import Path

from risotto_zoo.errors import UserError

from .files import write

ROOT = Path(__file__).parent.parent


def between(text: str, marker: str, table: str) -> str:
    """`text` with `table` between the marker's two comments.

    Raises:
        UserError: If a comment is missing.
    """
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if start not in text or end not in text:
        raise UserError(f"the markers {start} and {end} are missing")
    return text[: text.index(start) + len(start)] + f"\n{table}\n" + text[text.index(end) :]


def stale(pages: dict[Path, bytes]) -> dict[Path, bytes]:
    """Those whose file is missing or says something else."""
    return {path: data for path, data in pages.items() if not path.is_file() or path.read_bytes() != data}


def write_pages(pages: dict[Path, bytes]) -> None:
    """Write what is stale, and tell it."""
    for path, data in stale(pages).items():
        write(path, data)
        print(f"wrote {_short(path)}", file=sys.stderr)


def check_pages(pages: dict[Path, bytes], command: str) -> None:
    """Refuse pages that are not as they should be.

    Raises:
        UserError: If one is stale; it names the command that writes it.
    """
    if found := stale(pages):
        raise UserError(f"stale: {', '.join(map(_short, found))}; run {command}")


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
