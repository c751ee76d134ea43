"""What a run leaves behind, besides its weights: metrics.csv, curves.png, results.json, recipe.yaml."""

import csv
import io
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import risotto_zoo
from risotto_zoo.errors import UserError
from risotto_zoo.files import write_atomically

from .files import read_json
from .recipe import Recipe, differences, dump, load_recipe

FILES = (
    "results.json",
    "model.safetensors",
    "model_ema.safetensors",
    "model_raw.safetensors",
    "config.json",
    "metrics.csv",
    "curves.png",
    "recipe.yaml",
)
PATIENCE = 10.0
SLACK = 2.0  # seconds between the clocks of processes and of files


def check_output(folder: Path, recipe: Recipe, overwrite: bool, resume: bool) -> None:
    """Make sure that `folder` can be written and is free for this recipe, or holds an unfinished run of it.

    A run that has saved nothing yet may change its recipe, one that has only what cannot change its outcome. Nothing
    that the folder holds is touched yet: the recipe may still turn out not to fit the data.

    Raises:
        UserError: If it is used and neither may be overwritten nor resumed, or cannot be written.
    """
    if folder.is_file():
        raise UserError(f"output {folder} is a file; name a folder with --output")
    used = folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir())
    if used and not (folder / "recipe.yaml").is_file():
        raise UserError(f"output folder {folder} is not empty and holds no run; choose another with --output")
    if used and not overwrite:
        try:
            finished = finished_results(folder) is not None
        except UserError:  # damaged; its state tells how far it is
            finished = False
        if finished:
            raise UserError(f"{folder} holds a finished run; pass --overwrite to replace it, or another --output")
        if not resume:
            raise UserError(
                f"{folder} holds an unfinished run; pass --set resume=auto to go on or --overwrite to start again"
            )
        changed = differences(load_recipe(str(folder / "recipe.yaml")), recipe)
        if changed and _has_saved(folder):
            raise UserError(
                f"{folder} holds an unfinished run of another recipe, by {', '.join(changed)}; pass --overwrite or "
                "another --output"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written: {error.strerror}") from None


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Leave no folder behind that was not there before, should nothing be written into it."""
    new = not folder.exists()
    try:
        yield
    finally:
        if new:
            with suppress(OSError):  # it holds a run, as it should
                folder.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a checked folder meanwhile, where the system and its disk can do so.

    Raises:
        UserError: If one does; after some seconds, since the loader processes of a run that was killed hold it, too.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle, patience = os.open(folder, os.O_RDONLY), time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > patience:
                    raise UserError(
                        f"another process is training in {folder}; wait for it, or choose another folder"
                    ) from None
                time.sleep(0.2)
                continue
            except OSError:  # a disk that cannot lock, as some network disks
                pass
            break
        yield
    finally:
        os.close(handle)


def begin(folder: Path, recipe: Recipe, overwrite: bool) -> None:
    """Put the recipe into a checked folder, and versions if a run begins there.

    With `overwrite`, or if the run before it has saved nothing, remove that run's files, and only those.
    """
    for name in FILES:  # a run that was killed as it wrote leaves these
        for path in folder.glob(f"{name}.*tmp"):
            path.unlink()
    file = folder / "recipe.yaml"
    begun_with = _versions()
    if file.is_file() and not overwrite:
        if load_recipe(str(file)) == recipe:
            return
        overwrite = not _has_saved(folder)
        if not overwrite:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            begun_with = "".join(line for line in lines if line.startswith("# "))
    text = f"{begun_with}{dump(recipe)}".encode()
    if overwrite:
        coming = folder / "recipe.yaml.tmp"
        write_atomically(coming, text)  # on a full disk nothing is lost
        for path in [*(folder / "state").glob("step-*"), *(folder / "tensorboard").glob("events.*")]:
            if path.is_file():
                path.unlink()
        for name in FILES:
            if name != "recipe.yaml":  # the folder stays that of a run, whenever this is interrupted
                (folder / name).unlink(missing_ok=True)
        coming.replace(file)
    else:
        write_atomically(file, text)


def _has_saved(folder: Path) -> bool:
    """Whether a run has left a state, or weights, which come first where states are far apart."""
    return (folder / "model.safetensors").is_file() or any((folder / "state").glob("step-*.json"))


def begun_since(folder: Path, moment: float) -> bool:
    """Whether the run in a folder was begun, not gone on with, after a moment in seconds since 1970."""
    try:
        return (folder / "recipe.yaml").stat().st_mtime > moment - SLACK
    except OSError:
        return False


def _versions() -> str:
    packages = {
        "risotto-zoo": risotto_zoo.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "huggingface-hub": huggingface_hub.__version__,
    }
    return "".join(f"# {name} {version}\n" for name, version in packages.items())


def version_of(folder: Path, package: str) -> str:
    """The version of a package that the run in `folder` was begun with."""
    for line in (folder / "recipe.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"# {package} "):
            return line.rpartition(" ")[2]
    return "unknown"


def finished_results(folder: Path) -> dict[str, Any] | None:
    """results.json, which a run writes when it ends; None if it has not.

    Raises:
        UserError: If it is damaged.
    """
    path = folder / "results.json"
    return read_json(path) if path.is_file() else None


def best(results: dict[str, Any]) -> dict[str, Any]:
    """The evaluation that counts: a release's, or that of a run's better weights, where it has averaged ones, too."""
    return results.get("evaluation") or results[results.get("better", "raw")]


def hardware(device: torch.device, processes: int) -> str:
    """What the run ran on, such as '1 x NVIDIA H200' or '2 threads of AMD EPYC'."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return f"{processes} x {device.type} device of a {platform.machine()} {platform.system()} machine"
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    threads = processes * torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {name}"


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """metrics.csv, one row an epoch."""
    if not history:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(folder / "metrics.csv", text.getvalue().encode())


def a_row_a_line(record: dict[str, Any], key: str) -> bytes:
    """A record as JSON with each item of its list or dict `key` on one line: smaller, and its changes can be read."""
    items, frame = record[key], "[]"
    if isinstance(items, dict):
        rows, frame = (f"{json.dumps(name)}: {json.dumps(item)}" for name, item in items.items()), "{}"
    else:
        rows = map(json.dumps, items)
    text = f"{frame[0]}\n  " + ",\n  ".join(rows) + f"\n {frame[1]}"
    whole = json.dumps({**record, key: type(items)()}, indent=1)
    return (whole.replace(f'"{key}": {frame}', f'"{key}": {text}') + "\n").encode()


def read_metrics(folder: Path) -> list[dict[str, float | None]]:
    """The rows of metrics.csv, None where an epoch had no validation; no rows if there is no such file."""
    if not (folder / "metrics.csv").is_file():
        return []
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]


def write_curves(folder: Path, history: list[dict[str, Any]], title: str) -> None:
    """curves.png: loss and accuracy of training and validation by epoch."""
    if not history:
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)

    def plot(axis: Axes, key: str, label: str, scale: float = 1.0) -> None:
        rows = [row for row in history if row[key] is not None]
        epochs, values = [row["epoch"] for row in rows], [scale * row[key] for row in rows]
        axis.plot(epochs, values, label=label, marker="o" if len(rows) < 3 else None)

    plot(loss, "train_loss", "training")
    plot(loss, "val_loss", "validation")
    plot(accuracy, "train_top1", "training", 100)
    plot(accuracy, "val_top1", "validation", 100)
    if "ema_top1" in history[0]:
        plot(accuracy, "ema_top1", "validation, EMA", 100)
    loss.set(xlabel="epoch", ylabel="cross-entropy (nats)", title="Loss")
    accuracy.set(xlabel="epoch", ylabel="top-1 (%)", title="Accuracy")
    for axis in (loss, accuracy):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(literal(title))
    write_atomically(folder / "curves.png", png(figure))


def literal(text: str) -> str:
    """A name for a figure, which would take what stands between two dollar signs for a formula and is of UTF-8."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """The figure as a PNG with a palette, which is a third as large: the repository and the Hub hold one a release."""
    figure.set_dpi(120)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # it draws boxes in their place
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    buffer = io.BytesIO()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    image.quantize(128, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def write_results(folder: Path, results: dict[str, Any]) -> None:
    write_atomically(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
