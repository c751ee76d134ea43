"""Studies as grids of recipes: what is missing is run, what was broken off resumed, what is done never run again.

A study is a YAML file in training/studies: arms to compare, values to vary, a key to tune for each on a held-out part
of the training set, and seeds. A run that diverges is a result.
"""

import contextlib
import itertools
import json
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from tqdm import tqdm

from risotto_zoo.errors import UserError, did_you_mean
from risotto_zoo.files import sha256

from .console import say
from .distributed import World, choose_device, cores
from .engine import Diverged, Stopped, train
from .files import read_json, write
from .recipe import Recipe, Section, assign, explain, read_with_base, validate
from .run_folder import finished_results, hardware, read_metrics, version_of

STUDIES = Path(__file__).parent / "studies"
RUNS = Path("runs") / "studies"
HELD_OUT = 0.1
TUNING_SEED = 0
THREADS = 1  # of each training on a CPU


class Axis(Section):
    key: str = Field(description="recipe key that is varied")
    label: str = Field(description="what the figure's axis says")
    values: list[Any] = Field(min_length=1)
    log: bool = False


class Tuning(Section):
    key: str = Field(description="recipe key that is chosen for each arm and value, on the held-out tenth")
    values: list[Any] = Field(min_length=1)


class Claim(Section):
    text: str = Field(description="what is claimed, in our words")
    ours: bool = Field(False, description="it is a question of this project, not a claim of the paper")
    measure: Literal["accuracy", "width"] = Field(
        "accuracy", description="what is compared: accuracy, or how many of the varied values are near the best"
    )
    better: str = Field(description="the arm, or ARM@VALUE, that should be ahead")
    than: list[str] = Field(min_length=1, description="arms, or ARM@VALUE, that it should be ahead of")


class Study(Section):
    title: str
    question: str
    recipe: dict[str, Any] = Field(description="keys that all runs share")
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1, description="recipe keys, with dots, of each setting; 'tune' gives it candidates of its own"
    )
    vary: Axis | None = None
    tune: Tuning | None = None
    seeds: list[int] = Field(min_length=1)
    claims: list[Claim] = Field([], description="compared and judged in the report")


@dataclass(frozen=True)
class Run:
    """One training of a study."""

    arm: str
    x: Any
    tuned: Any
    seed: int
    tuning: bool
    recipe: Recipe

    @property
    def key(self) -> str:
        """What the run is known by: its recipe without what is left at its default, so that new keys change nothing."""
        return sha256(self.recipe.model_dump_json(exclude_defaults=True).encode())[:16]


def study_names() -> list[str]:
    return sorted(path.stem for path in STUDIES.glob("[!_]*.yaml"))


def load_study(name: str) -> Study:
    """Read training/studies/NAME.yaml.

    Raises:
        UserError: For an unknown study or one that does not fit the schema, naming the key.
    """
    path = STUDIES / f"{name}.yaml"
    if not path.is_file():
        names = [*study_names(), "propagation", "first_step", "report"]
        raise UserError(f"unknown study {name!r}{did_you_mean(name, names)} (there is {', '.join(names)})")
    try:
        study = Study.model_validate(read_with_base(path))
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error.errors()[0], Study)}") from None
    for side in (
        part for claim in study.claims for whole in (claim.better, *claim.than) for part in whole.split(" - ")
    ):
        arm, at, value = side.partition("@")
        known = map(str, study.vary.values) if study.vary is not None else ()
        if arm not in study.arms or (at and value not in known):
            raise UserError(f"{path}: a claim compares {side!r}, which is no arm{did_you_mean(arm, study.arms)}")
    return study


def results_file(name: str) -> Path:
    return STUDIES / name / "results.json"


def tuning_runs(study: Study) -> list[Run]:
    """Every arm and value with every candidate, on the held-out part; none where nothing is tuned."""
    if study.tune is None:
        return []
    return [
        _run(study, arm, x, candidate, TUNING_SEED, tuning=True)
        for arm in study.arms
        for x in _values(study)
        for candidate in candidates(study, arm)
    ]


def candidates(study: Study, arm: str) -> list[Any]:
    """The values of the tuned key that are tried for an arm."""
    return study.arms[arm].get("tune", study.tune.values)


def final_runs(study: Study, records: dict[str, dict[str, Any]]) -> list[Run]:
    """Every arm, value and seed with the candidate that was best on the held-out part; missing ones are left out."""
    runs = []
    for arm in study.arms:
        for x in _values(study):
            choice = chosen(study, records, arm, x)
            if study.tune is None or choice is not None:
                runs += [_run(study, arm, x, choice, seed, tuning=False) for seed in study.seeds]
    return runs


def current(study: Study, records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The records of the runs that the study consists of as it is now, by what it calls its arms now."""
    wanted = {run.key: run for run in [*tuning_runs(study), *final_runs(study, records)]}
    return {key: {**record, "arm": wanted[key].arm} for key, record in records.items() if key in wanted}


def chosen(study: Study, records: dict[str, dict[str, Any]], arm: str, x: Any) -> Any:
    """The tuned value of an arm; None while a candidate has not been run, or if nothing is tuned."""
    if study.tune is None:
        return None
    scores = []
    for candidate in candidates(study, arm):
        record = records.get(_run(study, arm, x, candidate, TUNING_SEED, tuning=True).key)
        if record is None:
            return None
        scores.append((record["top1"], candidate))
    return max(scores, key=lambda pair: pair[0])[1]


def _values(study: Study) -> list[Any]:
    return study.vary.values if study.vary is not None else [None]


def _run(study: Study, arm: str, x: Any, tuned: Any, seed: int, tuning: bool) -> Run:
    values = json.loads(json.dumps(study.recipe))
    for key, value in study.arms[arm].items():
        if key != "tune":
            assign(values, key.split("."), value)
    if study.vary is not None:
        assign(values, study.vary.key.split("."), x)
    if study.tune is not None and tuned is not None:
        assign(values, study.tune.key.split("."), tuned)
    if tuning:
        assign(values, ["data", "holdout"], HELD_OUT)
    values["seed"] = seed
    return Run(arm, x, tuned, seed, tuning, validate(values, f"study, arm {arm}"))


def conduct(name: str, jobs: int, device: str | None) -> None:
    """Run what is missing of a study; its results.json is written after every run.

    Args:
        name: Of a study.
        jobs: Trainings at once.
        device: Where they run.

    Raises:
        UserError: If the study or its data is at fault.
    """
    study = load_study(name)
    file = results_file(name)
    stored = read_json(file) if file.is_file() else {"study": name, "runs": {}}
    records = stored["runs"]
    for runs in (lambda: tuning_runs(study), lambda: final_runs(study, records)):
        missing = [run for run in runs() if run.key not in records]
        with tqdm(total=len(missing), desc=name, unit="run", disable=None) as bar:
            for run, record in trained(missing, jobs, device, THREADS, RUNS):
                records[run.key] = record
                bar.update()
                say(f"{run.arm} {'' if run.x is None else run.x} seed {run.seed}: {_told(run, record)}")
                write(file, _text(stored))
    stored["runs"] = current(study, records)
    write(file, _text(stored))


def _told(run: Run, record: dict[str, Any]) -> str:
    how = "diverged" if record["diverged"] else f"{100 * record['top1']:.2f}%"
    return f"{how} in {record['seconds']:.0f} s" + (f" (tuning, {run.tuned})" if run.tuning else "")


def _text(stored: dict[str, Any]) -> str:
    return json.dumps(stored, indent=1) + "\n"


def trained(
    runs: list[Run], jobs: int, device: str | None, threads: int, output: Path
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Train in worker processes, `jobs` at once, into folders of `output`; each pair comes as soon as it is done.

    SIGTERM, Ctrl-C or an error stops all of them: each saves its state, no other is begun.
    """
    context, left = multiprocessing.get_context("spawn"), iter(runs)
    waiting: dict[Future, Run] = {}  # no more than run at once: what a pool has queued cannot be taken back
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
            try:
                while True:
                    for run in itertools.islice(left, jobs - len(waiting)):
                        waiting[pool.submit(_train_one, run, device, output)] = run
                    if not waiting:
                        return
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        record = future.result()
                        if record is None:
                            raise KeyboardInterrupt
                        yield waiting.pop(future), record
            finally:
                if waiting:
                    for worker in multiprocessing.active_children():
                        worker.terminate()
    except BrokenProcessPool:
        raise UserError(
            "the process of a training was killed, perhaps for want of memory; fewer at once (--jobs) need less, and "
            "the same command goes on"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, _frame: Any) -> None:
    raise KeyboardInterrupt(number)


def _train_one(run: Run, device: str | None, output: Path) -> dict[str, Any] | None:
    """Train, or read what an earlier study has trained by the same recipe; None if a signal stopped it."""
    folder, log = output / run.key, output / "logs" / f"{run.key}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    where = World(0, 1, choose_device(device))
    diverged = (folder / "diverged").is_file()
    if finished_results(folder) is None and not diverged:
        with open(log, "a", buffering=1, encoding="utf-8") as file, contextlib.redirect_stderr(file):
            try:
                train(run.recipe, folder, where)
            except Diverged:
                diverged = True
                (folder / "diverged").touch()
            except Stopped:
                return None
    rows = read_metrics(folder)
    results = finished_results(folder) if not diverged else {}
    return {
        "arm": run.arm,
        "x": run.x,
        "tuned": run.tuned,
        "seed": run.seed,
        "tuning": run.tuning,
        "diverged": diverged,
        "top1": results["raw"]["top1"] if results else 0.0,
        "images": results["raw"]["images"] if results else 0,
        "by_epoch": [row["val_top1"] for row in rows],
        "train_top1": rows[-1]["train_top1"] if rows and not diverged else None,
        "seconds": rows[-1]["seconds"] if rows else 0.0,
        "hardware": results.get("hardware") or hardware(where.device, 1),
        "torch": version_of(folder, "torch"),
    }


def default_jobs(device: str | None) -> int:
    """Small nets leave most of a GPU idle, and one thread each is the fastest way to use a CPU's cores."""
    return 4 if choose_device(device).type == "cuda" else cores()
