"""Tables of numbers, generated: python -m training.tables writes them, --check fails if one is stale.

The numbers of a run that is not released live in training/results/NAME.json; --add copies them there. Those of
benchmarks are written to training/results/benchmarks by `python -m training.benchmark NAME --json`, those of studies
lie beside them. The tables stand between marker comments in README.md, training/README.md and
training/recipes/NOTES.md, and in the recipes' heads. For what comes from releases, python -m training.cards does the
same.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from risotto_zoo.errors import UserError, exits_cleanly

from . import cards
from .cards import CARDS, RECORDS, duration, releases
from .files import read_json, write
from .pages import ROOT, between, check_pages, write_pages
from .recipe import RECIPES, Recipe, differences, load_recipe, section_of, validate, without_places
from .report import verdicts
from .run_folder import a_row_a_line, best, finished_results, read_metrics


def sweep_table() -> str:
    """NOTES.md: what was tried, and how it did on held-out training images."""
    rows = [
        "| run | settings | held-out top-1 (95% interval) | held-out loss | training loss |",
        "|---|---|---|---|---|",
    ]
    for name, record in _records(RECORDS / "sweeps"):
        score = best(record["results"])
        low, high = score["top1_interval"]
        settings = ", ".join(f"{key}={value}" for key, value in _settings(record).items())
        rows.append(
            f"| {name} | {settings} | {100 * score['top1']:.1f}% ({100 * low:.1f} to {100 * high:.1f}) "
            f"| {score['loss']:.3f} | {record['history']['train_loss'][-1]:.3f} |"
        )
    return "\n".join(rows)


def schema_table(section: type = Recipe, prefix: str = "") -> str:
    """training/README.md: every key of a recipe, from the schema."""
    rows = [] if prefix else ["| key | default | meaning |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        nested = section_of(field.annotation)
        if field.description:
            default = "(required)" if field.is_required() else f"`{json.dumps(field.default)}`"
            rows.append(f"| `{prefix}{name}` | {default} | {field.description} |")
        if nested is not None:
            rows.append(schema_table(nested, f"{prefix}{name}."))
    return "\n".join(rows)


def speed_table(short: bool) -> str:
    """Every benchmark, a table for each machine.

    For README.md only what most people ask: the nets at work on a batch, in plain PyTorch.
    """
    head = [
        "| ours | peer | time of ours / peer's, of medians (quartiles of the rounds' ratios) | |",
        "|---|---|---|---|",
    ]
    tables: dict[str, list[str]] = {}
    for path in sorted((RECORDS / "benchmarks").glob("*.json")):
        found = read_json(path)
        place = f"{found['hardware']}, torch {found['torch']}, timm {found['timm']}"
        rows = tables.setdefault(place, [])
        for row in found["rows"]:
            detail = row["images"] is not None and (row["images"] == 1 or ", eager" not in row["what"])
            if short and (detail or "waiting" in row["what"]):
                continue
            low, high = row["spread"]
            ratio = f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})"
            rows.append(f"| {found['benchmark']}: {row['what']} | {row['peer']} | {ratio} | {absolute(row)} |")
    return "\n\n".join(
        "\n".join([*head, *rows, "", f"Medians of interleaved runs on {place}."])
        for place, rows in sorted(tables.items())
        if rows
    )


def absolute(row: dict[str, Any]) -> str:
    """The times of a benchmark's row, or the images a second and bytes where a run is one of inference."""
    if row["images"] is None:
        return f"{1000 * row['ours']:.4g} and {1000 * row['theirs']:.4g} ms"
    text = f"{row['images'] / row['ours']:.0f} and {row['images'] / row['theirs']:.0f} images/s"
    if row["memory"] and None not in row["memory"]:
        text += ", activations {:.0f} and {:.0f} MiB".format(*(value / 2**20 for value in row["memory"]))
    return text


def reached(name: str) -> str:
    """The line in a recipe's head: what came out of exactly this recipe, from its release or a recorded run."""
    recipe = load_recipe(name)
    for release, result in releases().items():
        if not differences(load_recipe(str(CARDS / release / "recipe.yaml")), recipe):
            return _reached(result)
    path = RECORDS / f"{name}.json"
    record = read_json(path) if path.is_file() else None
    start = releases().get(recipe.init_from)  # of the weights that it begins with there may be others since
    revision = None if start is None else f"v{start['version']}"
    known = record is not None and record["results"].get("init_revision") == revision
    if not known or differences(validate(record["recipe"], str(path)), recipe):
        return "Accuracy and time: has not been run."
    return _reached(record["results"])


def _reached(result: dict[str, Any]) -> str:
    score = best(result)
    return (
        f"Accuracy: {100 * score['top1']:.2f}% of {score['images']} images, seed {result['seed']}, in "
        f"{duration(result['train_seconds'])} on {result['hardware']}."
    )


def _records(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(path.stem, read_json(path)) for path in sorted(folder.glob("*.json"))]


def pages() -> dict[Path, bytes]:
    """Every file with a generated part, as it should be."""
    result: dict[Path, str] = {}
    for path, marker, table in (
        (ROOT / "README.md", "verdicts", verdicts()),
        (ROOT / "README.md", "speed", speed_table(short=True)),
        (ROOT / "training" / "README.md", "schema", schema_table()),
        (ROOT / "training" / "README.md", "speed", speed_table(short=False)),
        (RECIPES / "NOTES.md", "sweeps", sweep_table()),
    ):
        result[path] = between(result.get(path) or path.read_text(encoding="utf-8"), marker, table)
    for path in sorted(RECIPES.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        result[path] = re.sub(
            r"^# Accuracy.*$", lambda _, stem=path.stem: f"# {reached(stem)}", text, count=1, flags=re.M
        )
    return {path: text.encode() for path, text in result.items()}


def add(run: Path, sweep: bool) -> None:
    """Copy the numbers of a finished run into training/results (or its sweeps), under the run folder's name;
    its history by columns, to six digits.

    Raises:
        UserError: If the run is not finished, or one of a sweep was judged on test images.
    """
    results, rows = finished_results(run), read_metrics(run)
    if results is None or not rows or "evaluation" in results:  # a release has that
        raise UserError(f"{run} holds no finished run")
    history = {key: [_short(row[key]) for row in rows] for key in rows[0]}
    recipe = without_places(load_recipe(str(run / "recipe.yaml")))
    if sweep and not recipe.data.holdout:
        raise UserError(f"{run} was judged on test images, but a sweep is on held-out ones; set data.holdout")
    results["data"] = recipe.data.source
    record: dict[str, Any] = {"results": results, "history": history, "recipe": json.loads(recipe.model_dump_json())}
    target = (RECORDS / "sweeps" if sweep else RECORDS) / f"{run.absolute().name}.json"
    write(target, a_row_a_line(record, "history"))


def _short(value: float | None) -> float | int | None:
    if value is None:
        return None
    value = float(f"{value:.6g}")
    return int(value) if value.is_integer() else value


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """What tells a run of a sweep from the others."""
    if "settings" in record:  # of before recipes were recorded
        return record["settings"]
    recipe = validate(record["recipe"], "a record of training/results/sweeps")
    return {
        "model": record["results"]["model"],
        "lr": recipe.optimizer.lr,
        "other_lr": recipe.optimizer.other_lr,
        "clip": recipe.clip.value if recipe.clip else None,
        "images": record["results"]["train_images"],
        "epochs": recipe.epochs,
        **{key: value for key, (value, usual) in _unusual(recipe).items() if value != usual},
    }


def _unusual(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """What sweeps change now and then, and how it is in the runs that do not say it."""
    return {
        "data": (Path(recipe.data.source).name, "cifar10-jpeg"),
        "seed": (recipe.seed, 0),
        "batch": (recipe.batch_size, 128),
        "warmup": (recipe.warmup_epochs, 0.3),
        "model_args": (recipe.model_args, {}),
        "optimizer": (recipe.optimizer.name, "muon"),
        "momentum": (recipe.optimizer.momentum, 0.95),
        "alpha_lr": (recipe.optimizer.alpha_lr, None),
        "weight_decay": (recipe.optimizer.weight_decay, 0.01),
        "other_weight_decay": (recipe.optimizer.other_weight_decay, None),
        "mixup": (recipe.augment.mixup, 0.0),
        "cutmix": (recipe.augment.cutmix, 0.0),
        "mixup_prob": (recipe.augment.mixup_prob, 1.0),
        "weight_standardization": (recipe.weight_standardization, False),
        "centralize": (recipe.optimizer.centralize, False),
        "amp": (recipe.amp, None),
        "shift": (recipe.augment.shift, 4),
        "crop_scale": (recipe.augment.crop_scale, None),
        "cutout": (recipe.augment.cutout, 0),
        "side": (recipe.data.image_size, None),
        "train_side": (recipe.data.train_size, None),
        "options": (recipe.optimizer.options, {}),
        "label_smoothing": (recipe.label_smoothing, 0.0),
        "ema": (recipe.ema_decay, None),
    }


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 2 if a table is stale")
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="RUN", help="record these finished runs")
    parser.add_argument("--sweep", action="store_true", help="with --add: they belong to a sweep")
    args = parser.parse_args()
    for run in args.add:
        add(run, args.sweep)
    if args.check:
        check_pages(pages(), "python -m training.tables")
        return
    if args.add:
        write_pages(cards.pages())  # the README's results have rows of records, too
    write_pages(pages())


if __name__ == "__main__":
    main()
