"""Benchmarks against a peer run side by side: python -m training.benchmark init|step|input|load

Every row is a ratio of medians of interleaved measurements, with the spread of the ratios of single rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from risotto_zoo.errors import UserError, exits_cleanly
from risotto_zoo.hub import MANIFEST, release_file
from risotto_zoo.models import create_model

from .data import View
from .distributed import World, choose_device
from .optimization import build_optimizer
from .pipelines import build_pipeline
from .recipe import Recipe, validate
from .run_folder import hardware


@dataclass
class Row:
    """One comparison. Times are medians in seconds; the ratio is ours to the peer's; spread is its quartiles."""

    what: str
    ours: float
    peer: str
    theirs: float
    ratio: float
    spread: tuple[float, float]


def compare(what: str, ours: Callable[[], None], peer: str, theirs: Callable[[], None], rounds: int) -> Row:
    """Time both in turn, `rounds` times after one warm-up of each."""
    ours()
    theirs()
    times: list[tuple[float, float]] = []
    for _ in tqdm(range(rounds), what, leave=False, disable=None):
        times.append((_seconds(ours), _seconds(theirs)))
    return _row(what, peer, times)


def _row(what: str, peer: str, times: list[tuple[float, float]]) -> Row:
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [a / b for a, b in times]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Row(what, mine, peer, other, mine / other, (low, high))


def _seconds(run: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def init_rows(args: argparse.Namespace) -> list[Row]:
    """Creating a net beside timm's and torchvision's constructor of the same depth, in the same process."""
    rows = []
    for name in args.models or ["resnet18", "resnet50", "resnet152"]:
        ours = f"risotto_{name}"
        make = lambda ours=ours: create_model(ours)  # noqa: E731
        rows.append(compare(ours, make, f"timm {name}", lambda name=name: create_model(name), args.rounds))
        peer = lambda name=name: getattr(torchvision.models, name)(weights=None)  # noqa: E731
        rows.append(compare(ours, make, f"torchvision {name}", peer, args.rounds))
    return rows


def step_rows(args: argparse.Namespace) -> list[Row]:
    """Forward, backward and optimizer of each net without normalization beside its twin with batch norm.

    Then the time that a step waits for a batch of the resident pipeline, beside the whole step.
    """
    device = choose_device(args.device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(args.data) if args.data else _sample_folder(Path(folder))
        for name in args.models or [
            "risotto_resnet20",
            "risotto_resnet56",
            "risotto_resnet18_cifar",
            "risotto_resnet18",
        ]:
            steps = [_step(name + suffix, args.batch, device) for suffix in ("", "_bn")]
            rows.append(compare(f"{name}, batch {args.batch}", steps[0], f"{name}_bn", steps[1], args.rounds))
            rows.append(_waiting(name, source, args, device))
    return rows


def _waiting(name: str, source: Path, args: argparse.Namespace, device: torch.device) -> Row:
    config = timm.get_pretrained_cfg(name).to_dict()
    side = min(config["input_size"][1], 128)
    settings = {"augment": {"flip": True, "shift": 4}, "batch_size": args.batch, "model": name}
    recipe = validate({**settings, "data": {"source": str(source), "image_size": side}}, "benchmark")
    pipeline = build_pipeline(recipe, View.of({**config, "input_size": (3, side, side)}), World(0, 1, device))
    model = create_model(name, num_classes=len(pipeline.classes)).to(device).train()
    optimizer = build_optimizer(model, recipe)
    batches = pipeline.epoch(0)
    current: list[tuple[torch.Tensor, torch.Tensor]] = []

    def work() -> None:
        images, targets = current.pop()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    times = []
    for _ in range(min(args.rounds + 1, pipeline.steps_per_epoch)):
        waited = _seconds(lambda: current.append(next(batches)))
        times.append((waited, waited + _seconds(work)))
    return _row(f"{name}, waiting for a batch", "its whole step", times[1:] or times)


def _step(name: str, batch: int, device: torch.device) -> Callable[[], None]:
    model = create_model(name).to(device, memory_format=torch.channels_last).train()
    side = min(model.default_cfg["input_size"][1], 128)
    images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(model.num_classes, (batch,), device=device)
    optimizer = build_optimizer(model, Recipe(model=name))

    def run() -> None:
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def input_rows(args: argparse.Namespace) -> list[Row]:
    """An epoch of images through both pipelines beside torchvision's ImageFolder and DataLoader on the same files."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(args.data) if args.data else _sample_folder(Path(folder))
        world = World(0, 1, choose_device(args.device))
        recipes = {
            "resident": {"augment": {"flip": True, "shift": 4}, "batch_size": args.batch},
            "streaming": {"augment": {"flip": True}, "batch_size": args.batch},
        }
        rows, peer = [], None
        for kind, settings in recipes.items():
            data = {"source": str(source), "pipeline": kind, "image_size": args.size, "workers": args.workers}
            recipe = validate({**settings, "data": data}, "benchmark")
            config = {**timm.get_pretrained_cfg(recipe.model).to_dict(), "input_size": (3, args.size, args.size)}
            pipeline = build_pipeline(recipe, View.of(config), world)  # says what is wrong with the data, if anything
            peer = peer or _torchvision_epoch(source, args, world.device)
            images = pipeline.steps_per_epoch * args.batch
            label = f"{kind} pipeline, {images} images of {args.size} px"

            def run(pipeline: object = pipeline) -> None:
                for _batch, _targets in pipeline.epoch(0):
                    pass

            rows.append(compare(label, run, "torchvision ImageFolder + DataLoader", peer, args.rounds))
            print(f"{label}: {images / rows[-1].ours:.0f} images/s, peer {images / rows[-1].theirs:.0f} images/s")
        return rows


def load_rows(args: argparse.Namespace) -> list[Row]:
    """Creating a released model with its weights, verified, beside creating it and reading the file."""
    rows = []
    for name in args.models or [name for name in MANIFEST if release_file(name) is not None]:
        path = release_file(name)
        if path is None:
            raise UserError(f"{name} is no release whose weights are on this machine")

        def peer(name: str = name, path: Path = path) -> None:
            create_model(name)
            safetensors.torch.load_file(path)

        ours = lambda name=name: create_model(name, pretrained=True)  # noqa: E731
        rows.append(compare(name, ours, "creating it + reading the file", peer, args.rounds))
    return rows


def _torchvision_epoch(source: Path, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    steps = [
        transforms.Resize(args.size),
        transforms.RandomCrop(args.size, padding=4, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.5,) * 3, (0.25,) * 3),
    ]
    dataset = torchvision.datasets.ImageFolder(str(source / "train"), transforms.Compose(steps))
    loader = DataLoader(dataset, args.batch, shuffle=True, num_workers=args.workers, drop_last=True)

    def run() -> None:
        for images, targets in loader:
            images.to(device), targets.to(device)

    return run


def _sample_folder(folder: Path, count: int = 2000) -> Path:
    """Crops of scikit-learn's two sample photos as JPEG files of 32 px, where no data is named."""
    draw = np.random.default_rng(0)
    for name, photo in zip(("church", "flower"), load_sample_images().images, strict=True):
        for split, images in (("train", count), ("val", 20)):
            (folder / split / name).mkdir(parents=True)
            for i in range(images):
                top, left = draw.integers(0, photo.shape[0] - 32), draw.integers(0, photo.shape[1] - 32)
                crop = Image.fromarray(photo[top : top + 32, left : left + 32])
                crop.save(folder / split / name / f"{i:05}.jpg", quality=75)
    return folder


BENCHMARKS = {"init": init_rows, "step": step_rows, "input": input_rows, "load": load_rows}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--models", nargs="+", help="init, step, load: models (init: names without risotto_)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved measurements of each side (default: 9)")
    parser.add_argument("--batch", type=int, default=128, help="images of a batch (default: 128)")
    parser.add_argument("--size", type=int, default=32, help="input: side of the images (default: 32)")
    parser.add_argument("--data", help="input, step: image folder (default: crops of two sample photos)")
    parser.add_argument("--workers", type=int, default=2, help="input: loader processes (default: 2)")
    parser.add_argument("--device", help="cpu, cuda (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if args.rounds < 2 or args.batch < 2 or args.size < 8 or args.workers < 0:
        parser.error("--rounds and --batch start at 2, --size at 8, --workers at 0")
    return args


@exits_cleanly
def main() -> None:
    args = _arguments()
    rows = BENCHMARKS[args.name](args)
    where = hardware(choose_device(args.device), 1)
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    print(f"\n{args.name} on {where}, {versions}: medians of {args.rounds} rounds")
    print(f"{'ours':44} {'seconds':>9}   {'peer':38} {'seconds':>9} {'ratio':>7}  quartiles")
    for row in rows:
        low, high = row.spread
        print(
            f"{row.what:44} {row.ours:9.4f}   {row.peer:38} {row.theirs:9.4f} {row.ratio:7.3f}  {low:.3f} to {high:.3f}"
        )
    if args.json is not None:
        facts = {"benchmark": args.name, "hardware": where, "torch": torch.__version__, "timm": timm.__version__}
        try:
            args.json.write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{args.json} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    main()
