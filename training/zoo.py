"""Train and release the zoo, in order of value and within a time: python -m training.zoo --minutes 25

The rows stand in training/zoo.yaml. What is finished is not run again, what was broken off is resumed, and when the
time is over the state is saved; the same command goes on. A row is released as soon as it and its twin are finished.
"""

import argparse
import io
import math
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from risotto_zoo.errors import UserError, did_you_mean, exits_cleanly

from .console import say
from .distributed import World, choose_device, cores
from .engine import DIVERGED, Diverged, Stopped, StopSignals, train
from .recipe import Recipe, Section, differences, explain, load_recipe
from .release import release
from .run_folder import finished_results

ROWS = Path(__file__).parent / "zoo.yaml"
PIECE = 16_000_000


class Row(Section):
    recipe: str
    twin: str | None = Field(None, description="recipe of the same net with batch norm")
    tag: str = Field(description="name of the data set")
    half: bool = Field(False, description="release float16")

    @property
    def names(self) -> list[str]:
        """Its recipes: its own, and the twin's."""
        return [name for name in (self.recipe, self.twin) if name is not None]


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
    done = finished_results(run) is not None
    if done and differences(load_recipe(str(run / "recipe.yaml")), recipe):
        raise UserError(f"{run} holds a run of another recipe; move it away, or name another folder with --runs")
    return done


def train_row(row: Row, runs: Path, settings: list[str], device: str | None) -> list[Path]:
    """Train a row's recipe and its twin, as far as they are not; the folders of both, which are finished then.

    Raises:
        UserError: If a folder holds another run, or the data is missing.
        Diverged: On a non-finite loss.
        Stopped: When a signal, or the end of the time, has stopped a run; its state is saved.
    """
    for name in row.names:
        recipe, folder = load_recipe(name, settings), folder_of(name, runs)
        if not finished(folder, recipe):
            say(f"--- {name}")
            train(recipe, folder, World(0, 1, choose_device(device)))
    return [folder_of(name, runs) for name in row.names]


def trained_at_once(
    rows: list[Row], jobs: int, runs: Path, settings: list[str], device: str | None
) -> Iterator[tuple[Row, dict[str, int]]]:
    """Train what the rows lack in processes of their own, `jobs` at once: a small net leaves most of a GPU idle.

    Each row comes as soon as its trainings have ended, with the exit codes of those that failed.

    Raises:
        Stopped: When a signal, or the end of the time, has stopped them; their states are saved.
    """
    pending, running, codes = list(rows), {}, {}
    waiting = list(dict.fromkeys(name for row in rows for name in row.names))
    options = [word for setting in settings for word in ("--set", setting)] + (["--device", device] if device else [])
    environment = {"OMP_NUM_THREADS": str(max(1, cores() // jobs)), **os.environ}
    (runs / "logs").mkdir(parents=True, exist_ok=True)
    with StopSignals() as stop:
        try:
            while pending:
                while waiting and len(running) < jobs and not stop.number:
                    name = waiting.pop(0)
                    if _lacking(name, runs, settings):
                        command = [sys.executable, "-m", "training.train", "--recipe", name]
                        command += ["--output", folder_of(name, runs), *options]
                        with open(_log(name, runs), "a", encoding="utf-8") as log:
                            running[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                        say(f"--- {name}, see {log.name}")
                    else:
                        codes[name] = 0
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    code = running.pop(name).returncode
                    if code < 0:  # by the system, when memory is short, say
                        with open(_log(name, runs), "a", encoding="utf-8") as log:
                            log.write(f"\nerror: killed by {signal.Signals(-code).name}\n")
                        code = 128 - code
                    codes[name] = code
                for row in [row for row in pending if all(name in codes for name in row.names)]:
                    pending.remove(row)
                    yield row, {name: codes[name] for name in row.names if codes[name]}
                if stop.number:
                    raise Stopped(stop.number)
                time.sleep(0.2)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


def _lacking(name: str, runs: Path, settings: list[str]) -> bool:
    try:
        return not finished(folder_of(name, runs), load_recipe(name, settings))
    except UserError:  # which its training will tell
        return True


def _log(name: str, runs: Path) -> Path:
    return runs / "logs" / f"{Path(name).stem}.txt"


def collect(run: Path, output: Path) -> list[Path]:
    """A run as tar files of at most 16 MB: `cat NAME.tar.* | tar -x` puts it together.

    One that is not finished comes with its state, so that it can be finished on another machine.
    """
    state = [] if (run / "results.json").is_file() else sorted((run / "state").glob("step-*.*"))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in [*sorted(path for path in run.iterdir() if path.is_file()), *state]:
            archive.add(path, f"{run.name}/{path.relative_to(run)}")
    data, output = buffer.getvalue(), output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    new = [output / f".{run.name}.tar.{i:04}" for i in range(-(-len(data) // PIECE))]
    for i, path in enumerate(new):
        path.write_bytes(data[i * PIECE : (i + 1) * PIECE])
    for old in output.glob(f"{run.name}.tar.*"):  # only now: what was packed before is better than half of this
        old.unlink()
    return [path.rename(output / path.name.removeprefix(".")) for path in new]


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
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once (default: 1)")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="pack the runs there instead of releasing")
    args = parser.parse_args()
    if args.minutes is not None and not args.minutes > 0:
        parser.error("--minutes must be more than 0")
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
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
    codes: list[int] = []
    done: list[Row] = []
    try:
        if args.jobs == 1:
            for row in rows:
                codes.append(_row(row, args))
                if not codes[-1]:
                    done.append(row)
        else:
            for row, failed in trained_at_once(rows, args.jobs, args.runs, args.set, args.device):
                for name, code in failed.items():
                    lines = _log(name, args.runs).read_text(encoding="utf-8").split("\n")
                    reason = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
                    say(f"{row.recipe} is left out: {reason}")
                codes += failed.values() or [_row(row, args)]
                if not codes[-1]:
                    done.append(row)
    except Stopped as stopped:
        say("stopped; the same command goes on from here")
        if time.monotonic() < end:
            codes.append(128 + int(stopped.args[0]))
    if args.collect is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is left to do is short, and the reason for all before
        for folder in (folder_of(name, args.runs) for row in rows if row not in done for name in row.names):
            if folder.is_dir():
                collect(folder, args.collect)
    return min(filter(None, codes), default=0)


def _row(row: Row, args: argparse.Namespace) -> int:
    """Train what the row lacks, and release or pack it; the exit code."""
    try:
        runs = train_row(row, args.runs, args.set, args.device)
        for run in runs:
            if args.collect is None:
                others = [other for other in runs if other != run]
                say(f"released {release(run, row.tag, others, half=row.half, device=args.device)}")
            else:
                collect(run, args.collect)
    except Diverged as error:
        say(f"{row.recipe} is left out: {error}")
        return DIVERGED
    except (UserError, OSError) as error:
        say(f"error: {row.recipe} is left out: {error}")
        return 2
    return 0


def _stop(number: int, _frame: Any) -> None:
    raise Stopped(number)


if __name__ == "__main__":
    main()
