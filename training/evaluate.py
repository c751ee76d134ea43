"""Evaluate models on labelled images: python -m training.evaluate risotto_resnet20.cifar10-jpeg --data FOLDER

Any timm model with weights, hf-hub:ORG/NAME, local-dir:FOLDER, or a file of python -m training.export. Several models
are compared on the same images. --robustness adds the accuracy on damaged images, --dead the ReLU channels that are
hardly ever active, --figures draws calibration and confusion.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from risotto_zoo.creation import create_model
from risotto_zoo.errors import UserError, exits_cleanly
from risotto_zoo.evaluation import (
    Calibration,
    Outcomes,
    calibration,
    channel_activity,
    compare,
    confusion,
    observe,
    per_class,
    summarize,
)

from .corruptions import CORRUPTIONS, STRENGTHS
from .data import ImageSet, View, load_set, loader_faults
from .distributed import World, choose_device, compiling
from .export import SUFFIXES, load_exported
from .files import check_place, write
from .pipelines import EVAL_BATCH, eval_batch, open_dataset, streamed_batches, validation_batches, validation_set
from .recipe import Data, load_recipe
from .run_folder import literal, png

Net = Callable[[Tensor], Tensor]
DAMAGED_AT_ONCE = 1000
DEAD = 0.001  # a channel active at fewer of all images' positions takes no part


@dataclass
class Streamed:
    """A set that is read anew for each model."""

    dataset: Dataset
    classes: list[str] | None  # as far as the set names them
    unreadable: tuple[str, ...]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="+", help="a model with weights, local-dir:FOLDER, hf-hub:ORG/NAME or a file, which the CPU runs"
    )
    parser.add_argument(
        "--data",
        help="'digits', an image folder, or a timm data set string (default: what a local run was validated on)",
    )
    parser.add_argument("--root", help="where a timm data set string finds its files")
    parser.add_argument("--split", help="split of a timm data set string, or sub-folder (default: validation)")
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read the images anew for each model, not into memory; for large sets (default for one model alone)",
    )
    parser.add_argument("--workers", type=int, default=2, help="streaming: loader processes (default: 2)")
    parser.add_argument("--image-size", type=int, help="side of the images (default: the model's)")
    parser.add_argument("--crop-pct", type=float, help="share of the resized image that is kept (default: the model's)")
    parser.add_argument(
        "--batch-size", type=int, help="images at once (default: as their size suggests, fewer if memory runs out)"
    )
    parser.add_argument("--amp", choices=["bfloat16", "float16"], help="autocast (default: float32)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--robustness", action="store_true", help="also on damaged images")
    parser.add_argument(
        "--dead", action="store_true", help=f"also count the ReLU channels active at less than {DEAD:.1%}% of positions"
    )
    parser.add_argument("--device", help="cpu, cuda, mps (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--csv", type=Path, help="write one line a model to this file")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="draw calibration and confusion of each model")
    args = parser.parse_args()
    if args.image_size is not None and args.image_size < 1:
        parser.error("--image-size starts at 1")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        parser.error("--crop-pct is more than 0 and at most 1")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error("--batch-size starts at 1")
    if args.workers < 0:
        parser.error("--workers starts at 0")
    if args.stream and (args.data is None or args.robustness):
        parser.error("--stream needs --data, and does not go with --robustness")
    if args.dead and args.compile:
        parser.error("--dead looks into the model, which does not go with --compile")
    # Images that are looked at once need no memory, and decoding them beside the model is faster.
    args.stream |= len(args.model) == 1 and not args.robustness and args.data not in (None, "digits")
    return args


@exits_cleanly
def main() -> None:
    args = _arguments()
    device = choose_device(args.device)
    sets: dict[tuple[View, str], ImageSet | Streamed] = {}
    observed: dict[str, Outcomes] = {}
    reports = []
    first = args.model[0]
    data_of = {name: None if args.data is not None else _data_of_run(name, args) for name in args.model}
    for name, data in data_of.items():
        if _images_of(data) != _images_of(data_of[first]):
            raise _other_images(first, name)
    for path in (args.json, args.csv, args.figures and _figure(args.figures, first, "calibration")):
        if path is not None:
            check_place(path)
    for name in args.model:
        net, view, classes, labels = load(name, args, device)
        data = data_of[name]
        if (view, repr(data)) not in sets:
            sets[view, repr(data)] = _images(data, args, view)
            _tell_unreadable(sets[view, repr(data)])
        images = sets[view, repr(data)]
        images.classes = images.classes or labels or [str(i) for i in range(classes)]
        ordered = _in_order_of(images.classes, name, net, classes, labels)
        with _watched(name, net) if args.dead else nullcontext() as activity:
            observed[name] = run(ordered, images, view, device, args)
        reports.append(_report(name, observed[name], images))
        if activity is not None:
            dead = {relu: [int((shares < DEAD).sum()), len(shares)] for relu, shares in activity.items()}
            reports[-1]["dead_channels"] = dead
        _print(reports[-1])
        if args.robustness:
            reports[-1]["robustness"] = _robustness(ordered, images, view, device, args)
            _print_robustness(reports[-1])
        if args.figures is not None:
            _draw(args.figures, name, observed[name], images.classes)
    if len(args.model) > 1:
        _print_table(reports)
    for other in args.model[1:]:
        try:
            comparison = compare(observed[first], observed[other])
        except ValueError:
            raise _other_images(first, other) from None
        reports.append({"first": first, "second": other, **asdict(comparison)})
        low, high = comparison.interval
        print(
            f"{first} against {other}: {100 * comparison.difference:+.2f} points "
            f"(95% interval {100 * low:+.2f} to {100 * high:+.2f}), McNemar p = {comparison.p:.3g}"
        )
    if args.json is not None:
        write(args.json, json.dumps(reports, indent=2) + "\n")
    if args.csv is not None:
        write(args.csv, _csv(reports))


def _other_images(first: str, other: str) -> UserError:
    return UserError(f"{first} and {other} saw different images; name one set for both with --data")


def load(name: str, args: argparse.Namespace, device: torch.device) -> tuple[Net, View, int, list[str] | None]:
    """The model as a function of batches, how its images are prepared, and its classes.

    Raises:
        UserError: If there is no such model or its weights cannot be had.
    """
    if Path(name).suffix in SUFFIXES:
        exported = load_exported(Path(name))
        side = exported.view.input_size[1]
        if args.image_size not in (None, side):
            raise UserError(f"{name} was exported for images of {side} px; --image-size cannot change that")
        if args.amp or args.compile:
            raise UserError(f"{name} is an exported file, which runs as it is; leave --amp and --compile out")
        on_cpu = lambda images: exported.run(images.cpu()).to(images.device)  # noqa: E731
        return on_cpu, _adjusted(exported.view, args), exported.classes, exported.labels
    model = create_model(name, pretrained=True).to(device).eval()
    made_for = View.of(resolve_data_config(model=model, use_test_size=True, verbose=False))
    view, side = _adjusted(made_for, args), made_for.input_size[1]
    fixed = model.pretrained_cfg.get("fixed_input_size") and not getattr(model, "dynamic_img_size", False)
    if fixed and view.input_size[1] != side:
        raise UserError(f"{name} takes images of {side} px alone; --image-size cannot change that")
    labels = model.pretrained_cfg.get("label_names")
    net = torch.compile(model) if args.compile else model
    return net, view, model.num_classes, list(labels) if labels else None


def _adjusted(view: View, args: argparse.Namespace) -> View:
    side = args.image_size or view.input_size[1]
    return replace(view, input_size=(view.input_size[0], side, side), crop_pct=args.crop_pct or view.crop_pct)


def run(net: Net, images: ImageSet | Streamed, view: View, device: torch.device, args: argparse.Namespace) -> Outcomes:
    """Observe a model on a set, with half as many images at once each time the device runs out of memory."""
    amp = getattr(torch, args.amp) if args.amp else None
    batch, source = args.batch_size or eval_batch(view), args.data or "what the run was validated on"
    while True:
        try:
            with compiling(args.compile), loader_faults(f"reading {source}", "take fewer --workers"):
                outcomes = observe(net, _batches(images, view, device, batch, args.workers), amp)
        except torch.OutOfMemoryError:
            if batch == 1 or args.batch_size:
                raise UserError(f"{batch} images of {view.input_size[1]} px do not fit into the device") from None
            batch //= 2
        else:
            if not len(outcomes.correct):
                raise UserError(f"none of the images of {source} can be read")
            return outcomes


def _batches(
    images: ImageSet | Streamed, view: View, device: torch.device, batch: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(images, Streamed):
        total = -(-len(images.dataset) // batch)
        parts = streamed_batches(images.dataset, view, device, workers, len(images.classes), batch)
    else:
        total = -(-len(images) // batch)
        parts = validation_batches(images, view, World(0, 1, device), batch)
    return iter(tqdm(parts, "evaluating", total, unit="batch", disable=None, leave=False))


def _data_of_run(name: str, args: argparse.Namespace) -> Data:
    """What the run in a local folder was trained and validated on."""
    source, _, folder = name.partition(":")
    recipe_file = Path(folder) / "recipe.yaml"
    if source != "local-dir" or not recipe_file.is_file():
        load(name, args, torch.device("cpu"))  # says what is wrong with the name, if anything is
        raise UserError(f"{name} does not say what to evaluate it on; name a folder with --data")
    data: Data = load_recipe(str(recipe_file)).data
    changes: dict[str, Any] = {"root": args.root} if args.root else {}
    if args.split:  # not what the run held out
        changes |= {"val_split": args.split, "holdout": 0.0}
    return data.model_copy(update=changes)


def _images_of(data: Data | None) -> tuple:
    """What decides which images a run is validated on; how they are prepared does not."""
    if data is None:
        return ()
    part = (data.train_split, data.train_images) if data.holdout else (data.val_split,)
    return (data.source, data.root, data.holdout, *part)


def _images(data: Data | None, args: argparse.Namespace, view: View) -> ImageSet | Streamed:
    """The images that a run was validated on, or those that the arguments name."""
    if data is None and not args.stream:
        return load_set(args.data, False, view, split=args.split, root=args.root)
    if data is not None and (data.pipeline == "resident" or args.robustness):
        return validation_set(data, view)
    source, split, root = (
        (args.data, args.split, args.root) if data is None else (data.source, data.val_split, data.root)
    )
    return Streamed(*open_dataset(source, False, split, root, view.input_size[0], batch_size=EVAL_BATCH))


def _tell_unreadable(images: ImageSet | Streamed) -> None:
    if images.unreadable:
        print(f"{len(images.unreadable)} images could not be read and are left out:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in images.unreadable), file=sys.stderr)


def _in_order_of(wanted: list[str], name: str, net: Net, classes: int, labels: list[str] | None) -> Net:
    """The model with its logits in the order of the data's classes: by name where the names are the same."""
    if len(wanted) != classes:
        differing = sorted(set(labels or ()) ^ set(wanted)) if set(labels or ()) & set(wanted) else []
        names = f"; one of them alone has {', '.join(differing[:5])}" if differing else ""
        raise UserError(f"{name} knows {classes} classes, but the data has {len(wanted)}{names}")
    if not labels or labels == wanted:
        return net
    if sorted(labels) != sorted(wanted):
        print("note: the class names of the data are not the model's; they are matched by position", file=sys.stderr)
        return net
    order = [labels.index(label) for label in wanted]
    return lambda batch: net(batch)[:, order]


def _watched(name: str, net: Net) -> AbstractContextManager[dict[str, Tensor]]:
    if not isinstance(net, nn.Module):
        raise UserError(f"--dead: {name} is an exported file, whose channels cannot be seen; name the model instead")
    return channel_activity(net)


def _report(name: str, outcomes: Outcomes, images: ImageSet | Streamed) -> dict[str, Any]:
    by_class = zip(images.classes, per_class(outcomes), strict=True)
    return {
        "model": name,
        **asdict(summarize(outcomes)),
        "calibration_error": calibration(outcomes).error,
        "streamed": isinstance(images, Streamed),  # then images_per_second includes decoding
        "per_class": {label: {"images": n, "top1": share if n else None} for label, (n, share) in by_class},
        "confusion": confusion(outcomes).tolist(),
    }


def _print(report: dict[str, Any]) -> None:
    print(f"{report['model']} on {report['images']} images of {len(report['per_class'])} classes")
    for name in ("top1", "top5"):
        low, high = report[f"{name}_interval"]
        print(f"top-{name[3:]}     {100 * report[name]:6.2f}%  (95% interval {100 * low:.2f} to {100 * high:.2f})")
    print(f"loss      {report['loss']:.4f}")
    print(f"calibration error {100 * report['calibration_error']:.2f}%")
    ranked = sorted((entry["top1"], label) for label, entry in report["per_class"].items() if entry["images"])
    (worst, last), (best, first) = ranked[0], ranked[-1]
    print(f"classes   from {100 * worst:.1f}% ({last}) to {100 * best:.1f}% ({first})")
    if "dead_channels" in report:
        layers = report["dead_channels"]
        found = ", ".join(f"{name} {dead} of {channels}" for name, (dead, channels) in layers.items() if dead)
        dead, channels = (sum(counts[i] for counts in layers.values()) for i in (0, 1))
        print(f"dead      {dead} of {channels} ReLU channels{f': {found}' if found else ''}")
    print(f"images/s  {report['images_per_second']:.0f}{', decoding included' if report['streamed'] else ''}")


def _print_table(reports: list[dict[str, Any]]) -> None:
    rows = [("model", "images", "top-1", "95% interval", "top-5", "loss", "ECE", "images/s")]
    for report in reports:
        low, high = report["top1_interval"]
        rows.append(
            (
                report["model"],
                str(report["images"]),
                f"{100 * report['top1']:.2f}%",
                f"{100 * low:.2f} to {100 * high:.2f}",
                f"{100 * report['top5']:.2f}%",
                f"{report['loss']:.4f}",
                f"{100 * report['calibration_error']:.2f}%",
                f"{report['images_per_second']:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for name, *cells in rows:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)))


def _robustness(
    net: Net, images: ImageSet, view: View, device: torch.device, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Top-1 on damaged images, by kind of damage and strength; damaged a part at a time, to need little memory."""
    result: dict[str, list[float]] = {}
    for kind, corrupt in CORRUPTIONS.items():
        for strength in range(STRENGTHS):
            generator, correct = torch.Generator().manual_seed(strength), 0
            for part in torch.arange(len(images)).split(DAMAGED_AT_ONCE):
                some = images.subset(part)
                damaged = replace(some, images=corrupt(some.images, strength, generator))
                correct += int(run(net, damaged, view, device, args).correct.sum())
            result.setdefault(kind, []).append(correct / len(images))
    return result


def _print_robustness(report: dict[str, Any]) -> None:
    print("top-1 on damaged images, from weak to strong")
    for kind, values in report["robustness"].items():
        print(f"  {kind:10} {' '.join(f'{100 * value:6.2f}%' for value in values)}")


def _csv(reports: list[dict[str, Any]]) -> str:
    keys = [
        "model",
        "images",
        "top1",
        "top1_low",
        "top1_high",
        "top5",
        "loss",
        "calibration_error",
        "images_per_second",
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for report in reports:
        if "model" in report:
            low, high = report["top1_interval"]
            writer.writerow({**report, "top1_low": low, "top1_high": high})
    return text.getvalue()


def _draw(folder: Path, name: str, outcomes: Outcomes, classes: list[str]) -> None:
    write(_figure(folder, name, "calibration"), png(reliability_diagram(outcomes)))
    write(_figure(folder, name, "confusion"), png(confusion_matrix(outcomes, classes)))


def _figure(folder: Path, name: str, kind: str) -> Path:
    return folder / f"{name.replace(':', '_').replace('/', '_')}-{kind}.png"


def reliability_diagram(outcomes: Outcomes) -> Figure:
    """Accuracy by confidence, and how many images there are of each."""
    found: Calibration = calibration(outcomes)
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = len(found.counts)
    centres = [(i + 0.5) / bins for i in range(bins)]
    axes.bar(centres, found.accuracy, 1 / bins, edgecolor="white", label="accuracy")
    axes.plot([0, 1], [0, 1], "k--", linewidth=1, label="as confident as right")
    axes.set(ylabel="accuracy", ylim=(0, 1), title=f"expected calibration error {100 * found.error:.2f}%")
    axes.legend(frameon=False)
    counts.bar(centres, found.counts, 1 / bins, edgecolor="white", color="grey")
    counts.set(xlabel="confidence", ylabel="images", xlim=(0, 1))
    return figure


def confusion_matrix(outcomes: Outcomes, classes: list[str]) -> Figure:
    """Shares of each true class; numbers are written in while there is room for them."""
    counts = confusion(outcomes).double()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    side = min(12.0, 3 + 0.4 * len(classes))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 40:
        names = [literal(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90)
        axes.set_yticks(range(len(classes)), names)
    if len(classes) <= 20:
        for row in range(len(classes)):
            for column in range(len(classes)):
                value = shares[row, column].item()
                colour = "white" if value > 0.5 else "black"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set(xlabel="predicted", ylabel="true", title="share of each true class (%)")
    return figure


if __name__ == "__main__":
    main()
