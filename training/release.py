"""Make a released model from a finished run: python -m training.release runs/cifar10_resnet20 --tag cifar10-jpeg

The release is a folder, model_cards/NAME.TAG, laid out as its repository on the Hub. While the files of the checkout
stay under 28 MiB with them, weights of up to 4 MB go into the package and larger ones into the repository; else they
are for the Hub alone. With --output the same folder is made anywhere, and the zoo does not learn of it.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor

from risotto_zoo.checkpoints import WEIGHTS, check_state, read_tensors, read_verified
from risotto_zoo.creation import create_model, parse_name
from risotto_zoo.errors import UserError, exits_cleanly
from risotto_zoo.evaluation import evaluate
from risotto_zoo.files import sha256, write_atomically
from risotto_zoo.hub import PACKAGE
from risotto_zoo.isometry import probed_singular_values, signal_map
from risotto_zoo.models.resnet import OF_THE_START

from . import cards, tables
from .cards import CARDS, DATASETS, LICENSE, card, finetune_figure
from .data import View
from .distributed import World, choose_device
from .files import read_json
from .pages import write_pages
from .pipelines import EVAL_BATCH, open_dataset, streamed_batches, validation_batches, validation_set
from .recipe import Recipe, differences, dump, load_recipe, validate, without_places
from .run_folder import best, finished_results, read_metrics

PACKAGE_BYTES = 4_000_000
REPOSITORY_BYTES = 28 * 2**20
OF_TRAINING = ("drop_rate", "drop_path_rate")  # arguments of a net that its weights do not need
MADE = ("README.md", "results.json", WEIGHTS)
OPTIONAL = ("finetune.png",)
DOWNLOADED = (".cache", ".gitattributes")  # what comes with a release that was fetched from the Hub, and may go
COPIED = ("config.json", "recipe.yaml", "metrics.csv", "curves.png")
PROBES = 64


def release(
    run: Path,
    tag: str,
    baselines: list[Path] | None = None,
    output: Path | None = None,
    half: bool = False,
    device: str | None = None,
    finetunes: list[tuple[Path, Path]] | None = None,
    license: str | None = None,
) -> Path:
    """Write the release of a run and everything that is generated from it; returns its folder.

    Args:
        run: Folder of a finished run.
        tag: Name of the data set.
        baselines: Finished runs under the same conditions, or releases or records (training/results/NAME.json) of
            such, whose results the card shows beside this one's. If None, those of the release before are kept, unless
            the weights are new ones.
        output: The folder, if it is not to be one of the zoo's.
        half: Store the weights in float16 and evaluate what is stored.
        device: Where to evaluate, if `half`.
        finetunes: Pairs of finished runs on other data: from these weights, and from scratch with the same budget.
            If None, those of the release before are kept, unless the weights are new ones.
        license: Of the weights, as the Hub names it; that of the release before if None, Apache-2.0 if there is none.

    Raises:
        UserError: If a run is unfinished or its files do not belong together, or the net is not one that
            `timm.create_model` makes from its name alone. The release that was there before is untouched.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", tag):
        raise UserError(f"tag {tag!r}: use lower-case letters, digits, - and _, such as cifar10-jpeg")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise UserError(f"license {license!r}: give its identifier on the Hub, such as mit or cc-by-nc-4.0")
    results = _finished(run)
    if "evaluation" in results:
        raise UserError(f"{run} holds a release, not a run")
    state = read_tensors(read_verified(run / WEIGHTS, results["sha256"].get(WEIGHTS)), str(run / WEIGHTS))
    config = read_json(run / "config.json")
    recipe = load_recipe(str(run / "recipe.yaml"))
    if recipe.data.holdout:
        raise UserError(f"{run} was judged on held-out training images; a release needs a run with data.holdout: 0")
    _check_plain(config, state, run)
    name = f"{config['architecture']}.{tag}"
    better = results.pop("better", "raw")
    other = results.pop("ema" if better == "raw" else "raw", None)
    score = results.pop(better)
    if half:
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    data = safetensors.torch.save(state, metadata={"format": "pt"})
    read_tensors(data, f"{run} in float16" if half else str(run))  # what float16 cannot hold is infinite by now
    folder = (output or CARDS / name).resolve()
    before = _release_before(folder, name)
    if output is None:
        _staged(name).unlink(missing_ok=True)  # of a release that was killed
    license = license or before.get("license", LICENSE)
    location = "hub" if output else _location(name, len(data))
    config["model_args"] = {key: value for key, value in config["model_args"].items() if key not in OF_TRAINING}
    if labels := DATASETS.get(tag, {}).get("labels"):
        config["label_descriptions"] = labels
    files = {name: (run / name).read_bytes() for name in COPIED}
    files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    files[WEIGHTS] = data
    told = without_places(recipe)
    results["data"] = told.data.source
    if tag in DATASETS and Path(told.data.source).name != tag:
        raise UserError(f"{run} was trained on {told.data.source}, not on {tag}; name a tag of its own")
    if told != recipe:
        head = [line for line in files["recipe.yaml"].decode().splitlines(keepends=True) if line.startswith("#")]
        files["recipe.yaml"] = "".join([*head, dump(told)]).encode()
    sums = {key: sha256(value) for key, value in files.items()}
    different = {key for key, value in sums.items() if before["sha256"].get(key) != value}
    changed = bool(different & {"config.json", WEIGHTS})
    if half:
        known = not different & {"config.json", WEIGHTS, "recipe.yaml"}
        score = before["evaluation"] if known else _evaluated(run, recipe, state, device)
    results |= {
        "name": name,
        "version": before["version"] + changed,
        "weights": better,
        **({"averaged": True} if other is not None else {}),
        "dtype": "float16" if half else "float32",
        "location": location,
        "in_zoo": output is None,
        **({"license": license} if license != LICENSE else {}),
        "bytes": len(data),
        "sha256": sums,
        "evaluation": score,
        "init": config["model_args"].get("init", "risotto"),
        **({"init_from": told.init_from} if told.init_from is not None else {}),
        "baselines": [_baseline(path, results, told) for path in baselines or []],
        "isometry": _isometry(config, recipe),
        "finetunes": [_finetune(*pair, run, None if changed else name) for pair in finetunes or []],
    }
    for key, given in (("baselines", baselines), ("finetunes", finetunes)):
        if given is None and not changed:
            results[key] = before.get(key, [])
    _replace_folder(folder, results, files)
    if output is None:
        write_pages(cards.pages())
        write_pages(tables.pages())  # the head of its recipe
    return folder


def _finished(run: Path) -> dict[str, Any]:
    """Results of a run that has ended."""
    results = finished_results(run)
    if results is None or not all((run / name).is_file() for name in COPIED):
        raise UserError(f"{run} holds no finished run; run its training command again to finish it")
    return results


def _release_before(folder: Path, name: str) -> dict[str, Any]:
    """The results of the release that `folder` holds; what stands for none.

    Raises:
        UserError: If it holds anything else, which is not ours to replace.
    """
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    if old.is_dir() and not folder.exists():  # a release was interrupted between two renames
        old.rename(folder)
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return {"version": 0, "sha256": {}}
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        ours = results["name"] == name and isinstance(results["version"], int) and isinstance(results["sha256"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"} if ours else set()
    if others := names - {*COPIED, *MADE, *OPTIONAL, *DOWNLOADED}:
        raise UserError(
            f"{folder} holds {', '.join(sorted(others)[:3])} beside a release; move that away, or name another folder "
            "with --output"
        )
    if ours:
        return results
    raise UserError(f"{folder} holds something else than a release of {name}; name another folder with --output")


def _check_plain(config: dict[str, Any], state: dict[str, Tensor], run: Path) -> None:
    """The weights are those of a net that `timm.create_model` makes from its name alone."""
    name = config["architecture"]
    if not name.startswith("risotto_") or not timm.is_model(name):
        raise UserError(f"{run}: {name} is not a model of this zoo")
    if config["model_args"].get("init") == "fixup":
        raise UserError(
            f"{run} started by Fixup, with scalar biases that {name} does not have by its name alone; the run folder "
            "itself can be loaded, as local-dir:FOLDER"
        )
    structural = sorted(config["model_args"].keys() - {*OF_THE_START, *OF_TRAINING})
    if structural:
        raise UserError(
            f"{run} changed {', '.join(structural)} of {name} in model_args: a release must load by its name alone; "
            "register the variant under a name of its own first"
        )
    channels = config["pretrained_cfg"]["input_size"][0]
    model = create_model(name, num_classes=config["num_classes"], in_chans=channels, device="meta")
    cfg = {**config["pretrained_cfg"], "architecture": name, "num_classes": config["num_classes"]}
    check_state(state, model, cfg, f"{run}/{WEIGHTS}")


def _evaluated(run: Path, recipe: Recipe, state: dict[str, Tensor], device: str | None) -> dict[str, Any]:
    """The accuracy of exactly these weights, on the images that the run was validated on."""
    model = create_model(f"local-dir:{run}").to(choose_device(device))
    model.load_state_dict(state)
    view = View.of(resolve_data_config(model=model, verbose=False))
    data, on = recipe.data, next(model.parameters()).device
    if data.pipeline == "streaming":
        dataset, *_ = open_dataset(
            data.source, False, data.val_split, data.root, view.input_size[0], batch_size=EVAL_BATCH
        )
        batches = streamed_batches(dataset, view, on, data.workers, model.num_classes)
    else:
        batches = validation_batches(validation_set(data, view), view, World(0, 1, on))
    return asdict(evaluate(model, batches))


def _baseline(source: Path, ours: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What another run reached and how it differed, refused if its data or budget was another."""
    if source.suffix == ".json":  # a record of a run whose weights were not kept
        record = read_json(source)
        if not isinstance(record, dict) or not {"results", "recipe"} <= record.keys():
            raise UserError(f"baseline {source} is no record of a run; training/results holds such")
        results, theirs = record["results"], validate(record["recipe"], str(source))
    else:
        results = _finished(source)
        theirs = load_recipe(str(source / "recipe.yaml"))
    theirs = without_places(theirs)
    results["data"] = theirs.data.source
    for key in ("data", "train_images", "epochs"):
        if results[key] != ours[key]:
            raise UserError(
                f"baseline {source}: its {key} is {results[key]}, not {ours[key]}: the two cannot be compared"
            )
    return {**_outcome(results), "differs": differences(recipe, theirs)}


def _outcome(results: dict[str, Any]) -> dict[str, Any]:
    """What a table says of a run or a release."""
    kept = ("model", "epochs", "seed", "train_seconds", "hardware", "parameters")
    return {**{key: results[key] for key in kept}, "evaluation": best(results)}


def _finetune(tuned: Path, scratch: Path, run: Path, name: str | None) -> dict[str, Any]:
    """What a run reached on other data from the weights of `run`, which bear `name` already, and one from scratch."""
    sides = {}
    for side, folder in (("tuned", tuned), ("scratch", scratch)):
        results = _finished(folder)
        recipe = load_recipe(str(folder / "recipe.yaml"))
        if (side == "tuned") != (recipe.init_from is not None):
            raise UserError(f"{folder}: name the run that was fine-tuned first, then the one from scratch")
        if recipe.init_from is not None:
            source, place = parse_name(recipe.init_from)
            if recipe.init_from != name and (source != "local-dir" or Path(place).resolve() != run.resolve()):
                raise UserError(
                    f"{tuned} began from {recipe.init_from}, not from the weights of {run}; fine-tune again with "
                    f"--init-from local-dir:{run}"
                )
        curve = "ema_top1" if results.get("better") == "ema" else "val_top1"
        sides[side] = {
            **_outcome(results),
            "by_epoch": [row[curve] for row in read_metrics(folder)],
            "data": without_places(recipe).data.source,
        }
        size = read_json(folder / "config.json")["pretrained_cfg"]["input_size"][-1]
        sides[side] |= {"train_images": results["train_images"], "size": size}
    for key in ("model", "data", "train_images", "epochs", "size"):
        one, other = sides["tuned"][key], sides["scratch"][key]
        if one != other:
            raise UserError(f"{tuned} and {scratch} cannot be compared: {key} is {one} in one, {other} in the other")
    return sides


def _isometry(config: dict[str, Any], recipe: Recipe) -> dict[str, Any] | None:
    """Singular values of the signal Jacobian as the run began it; None with batch norm or another start."""
    others = config["model_args"].get("init", "risotto") != "risotto"
    if config["architecture"].endswith("_bn") or others or recipe.init_from is not None:
        return None
    size = config["pretrained_cfg"]["input_size"]
    args = {"num_classes": config["num_classes"], "in_chans": size[0], "seed": recipe.seed, **recipe.model_args}
    model = create_model(config["architecture"], **args).eval()
    image = torch.randn(size, generator=torch.Generator().manual_seed(0))
    values = probed_singular_values(signal_map(model), image, PROBES)
    return {"probes": len(values), "smallest": values.min().item(), "largest": values.max().item()}


def _location(name: str, size: int) -> str:
    """Where weights of this size go: all files that git has or would take must stay within the budget."""
    root = CARDS.parent
    try:
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        raise UserError(f"{root} is no git checkout, so the size of the zoo is not known; use --output") from None
    files = [root / line for line in listed.stdout.split("\0") if line]
    ours = {f"{name}.safetensors", name}
    others = [file for file in files if not ours & {file.name, file.parent.name}]
    if sum(file.lstat().st_size for file in others if os.path.lexists(file)) + size > REPOSITORY_BYTES:
        return "hub"
    return "package" if size <= PACKAGE_BYTES else "repository"


def _package_file(name: str) -> Path:
    return PACKAGE / "weights" / f"{name}.safetensors"


def _staged(name: str) -> Path:
    """Where weights wait until the rest of their release is written."""
    path = _package_file(name)
    return path.with_name(f".{path.name}.new")


def _replace_folder(folder: Path, results: dict[str, Any], files: dict[str, bytes]) -> None:
    """Build the folder beside its place and swap, so that the old release is there, whole, until the new one is."""
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    package_file, staged = _package_file(results["name"]), _staged(results["name"])
    packaged, renamed = results["location"] == "package", False
    try:
        new.mkdir(parents=True)
        for name in COPIED:
            write_atomically(new / name, files[name])
        write_atomically(new / "results.json", (json.dumps(results, indent=2) + "\n").encode())
        if results["finetunes"]:
            write_atomically(new / "finetune.png", finetune_figure(results["finetunes"]))
        write_atomically(new / "README.md", card(new).encode())
        if packaged:
            package_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(staged, files[WEIGHTS])
            (new / WEIGHTS).symlink_to(os.path.relpath(package_file, folder))
        else:
            write_atomically(new / WEIGHTS, files[WEIGHTS])
        # From here on nothing is written any more, only renamed.
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        renamed = True
        if packaged:
            staged.replace(package_file)
        elif results["in_zoo"]:
            package_file.unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from None
    finally:
        if renamed and packaged and staged.exists():  # the last renaming failed
            shutil.rmtree(folder, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        if packaged:
            staged.unlink(missing_ok=True)


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--tag", required=True, help="name of the data set, such as cifar10-jpeg")
    parser.add_argument(
        "--baseline",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="for the card's table: runs under the same conditions, their releases, or training/results/*.json",
    )
    parser.add_argument(
        "--finetune",
        nargs=2,
        type=Path,
        action="append",
        metavar=("TUNED", "SCRATCH"),
        help="finished runs on other data, from these weights and from scratch, for the card",
    )
    parser.add_argument("--output", type=Path, help="folder of a release outside the zoo (default: in model_cards)")
    parser.add_argument("--license", help=f"of the weights, as the Hub names it (default: as before, or {LICENSE})")
    parser.add_argument("--half", action="store_true", help="store float16, and evaluate what is stored")
    parser.add_argument("--device", help="where to evaluate with --half (default: cuda where there is one)")
    args = parser.parse_args()
    folder = release(
        args.run, args.tag, args.baseline, args.output, args.half, args.device, args.finetune, args.license
    )
    results = read_json(folder / "results.json")
    print(f"{folder}: {results['name']} version {results['version']}, {100 * results['evaluation']['top1']:.2f}% top-1")
    print(f"weights {results['bytes'] / 1e6:.1f} MB, {results['location']}")
    print(f"publish with: python -m training.publish {folder} --repo-id ORG/{results['name']}")


if __name__ == "__main__":
    main()
