"""Train and release the zoo, in order of value and within a time: python -m training.zoo --minutes 25

The rows stand in training/zoo.yaml. What is finished is not run again, what was broken off is resumed, and when the
time is over the state is saved; the same command goes on. A row is released as soon as it and its twin are finished.
"""

import argparse
import io
import math
import os
import signal
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from risotto_zoo.errors import UserError, did_you_mean, exits_cleanly
from risotto_zoo.files import write_atomically

from .cards import read_json
from .console import say
from .distributed import World, choose_device
from .engine import DIVERGED, Diverged, Stopped, train
from .recipe import Recipe, Section, explain, load_recipe
from .release import release

ROWS = Path(__file__).parent / "zoo.yaml"
PIECE = 16_000_000


class Row(Section):
    recipe: str
    twin: str | None = Field(None, description="recipe of the same net with batch norm")
    tag: str = Field(description="name of the data set")
    half: bool = Field(False, description="release float16")


def load_rows(wanted: list[str]) -> list[Row]:
    """The rows with these recipes, all if none is named, in the file's order.

    Raises:
        UserError: For an unknown recipe or a file that does not fit the schema.
    """
    try:
        rows = TypeAdapter(list[Row]).validate_python(yaml.safe_load(ROWS.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UserError(f"{ROWS}: {explain(error.errors()[0], Row)}") from None
    known = [row.recipe for row in rows]
    for name in wanted:
        if name not in known:
            raise UserError(
                f"{name!r} is no row of {ROWS.name}{did_you_mean(name, known)} (there is {', '.join(known)})"
            )
    return [row for row in rows if not wanted or row.recipe in wanted]


def folder_of(recipe: str, runs: Path) -> Path:
    return runs / Path(recipe).stem


def finished(run: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a finished run of this recipe.

    Raises:
        UserError: If it holds one of another recipe.
    """
    done = (run / "results.json").is_file() and bool(read_json(run / "results.json").get("finished"))
    if done and load_recipe(str(run / "recipe.yaml")) != recipe:
        raise UserError(f"{run} holds a run of another recipe; move it away, or name another folder with --runs")
    return done


def train_row(row: Row, runs: Path, settings: list[str], device: str | None, packed: Path | None = None) -> list[Path]:
    """Train a row's recipe and its twin, as far as they are not; the folders of both, which are finished then.

    Args:
        row: Of the zoo.
        runs: Where the folders are.
        settings: KEY=VALUE changes of every recipe.
        device: To train on.
        packed: Where each run goes in pieces as soon as it is finished, if anywhere.

    Raises:
        UserError: If a folder holds another run, or the data is missing.
        Diverged: On a non-finite loss.
        Stopped: When a signal, or the end of the time, has stopped a run; its state is saved.
    """
    folders = []
    for name in filter(None, (row.recipe, row.twin)):
        recipe, folder = load_recipe(name, settings), folder_of(name, runs)
        if not finished(folder, recipe):
            say(f"--- {name}")
            train(recipe, folder, World(0, 1, choose_device(device)))
        if packed is not None:
            collect(folder, packed)
        folders.append(folder)
    return folders


def collect(run: Path, output: Path) -> list[Path]:
    """A finished run as tar files of at most 16 MB, state left out: `cat NAME.tar.* | tar -x` puts it together."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(run.iterdir()):
            if path.is_file():
                archive.add(path, f"{run.name}/{path.name}")
    data, pieces = buffer.getvalue(), []
    output.mkdir(parents=True, exist_ok=True)
    for i, start in enumerate(range(0, len(data), PIECE)):
        pieces.append(output / f"{run.name}.tar.{i:02}")
        write_atomically(pieces[-1], data[start : start + PIECE])
    return pieces


@exits_cleanly
def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help="recipes of the rows to do (default: all)")
    parser.add_argument("--minutes", type=float, help="stop and save after this time (default: none)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of every recipe")
    parser.add_argument("--device", help="cpu, cuda (default: cuda where there is one)")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="pack finished runs there instead of releasing")
    args = parser.parse_args()
    if args.minutes is not None and not args.minutes > 0:
        parser.error("--minutes must be more than 0")
    rows = load_rows(args.rows)
    before = signal.signal(signal.SIGTERM, _stop)  # for the time when nothing is trained
    end = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    alarm = threading.Timer(60 * (args.minutes or 0), os.kill, (os.getpid(), signal.SIGTERM))
    if args.minutes:
        alarm.start()
    try:
        return _work(rows, args, end)
    finally:
        alarm.cancel()
        signal.signal(signal.SIGTERM, before)


def _work(rows: list[Row], args: argparse.Namespace, end: float) -> int:
    """Train and release row by row; the exit code. A row that cannot be done does not keep the others from it."""
    code = 0
    for row in rows:
        try:
            runs = train_row(row, args.runs, args.set, args.device, args.collect)
            for run in runs if args.collect is None else ():
                others = [other for other in runs if other != run]
                say(f"released {release(run, row.tag, others, half=row.half, device=args.device)}")
        except Diverged as error:
            say(f"{row.recipe} is left out: {error}")
            code = code or DIVERGED
        except UserError as error:
            say(f"error: {row.recipe} is left out: {error}")
            code = 2
        except Stopped as stopped:
            say(f"stopped in {row.recipe}; the same command goes on from here")
            return code if time.monotonic() >= end else 128 + int(stopped.args[0])
    return code


def _stop(number: int, _frame: Any) -> None:
    raise Stopped(number)


if __name__ == "__main__":
    main()
