"""Benchmarks against a peer run side by side: python -m training.benchmark NAME

Every row is a ratio of medians of interleaved measurements, with the spread of the ratios of single rounds.
"""

import argparse
import copy
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from risotto_zoo.creation import create_model
from risotto_zoo.errors import UserError, exits_cleanly
from risotto_zoo.evaluation import full_precision, observe, summarize
from risotto_zoo.hub import MANIFEST, release_file
from risotto_zoo.models.variants import own_cfg

from .data import View, cache_folder, load_set, open_source, split_folder
from .distributed import World, choose_device, cores
from .export import load_exported, write_net
from .files import check_place, write
from .grid import Run, trained
from .optimization import build_optimizer
from .pipelines import build_pipeline, open_dataset, streamed_batches, validation_batches
from .recipe import Recipe, validate
from .run_folder import hardware
from .tables import absolute


@dataclass
class Row:
    """One comparison. Times are medians in seconds; the ratio is ours to the peer's; spread is its quartiles."""

    what: str
    ours: float
    peer: str
    theirs: float
    ratio: float
    spread: tuple[float, float]
    images: int | None = None  # of one run
    memory: tuple[int | None, int | None] | None = None  # peak bytes of the tensors a run makes, ours and the peer's


def compare(what: str, ours: Callable[[], None], peer: str, theirs: Callable[[], None], rounds: int) -> Row:
    """Time both in turn, `rounds` times after one warm-up of each."""
    return _row(what, peer, _interleaved(what, [ours, theirs], rounds))


def _interleaved(what: str, runs: list[Callable[[], None]], rounds: int) -> list[tuple[float, ...]]:
    for run in runs:
        run()
    return [tuple(_seconds(run) for run in runs) for _ in tqdm(range(rounds), what, leave=False, disable=None)]


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
        make = lambda ours=ours: create_model(ours, num_classes=_classes(ours))  # noqa: E731
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
            steps = [_step(name + suffix, args, device) for suffix in ("", "_bn")]
            what = f"{name}, batch {args.batch}, {args.amp or 'float32'}"
            rows.append(compare(what, steps[0], f"{name}_bn", steps[1], args.rounds))
            rows.append(_waiting(name, source, args, device))
    return rows


def _waiting(name: str, source: Path, args: argparse.Namespace, device: torch.device) -> Row:
    config = own_cfg(name)
    side = min(config["input_size"][1], 128)
    settings = {"augment": {"flip": True, "shift": 4}, "batch_size": args.batch, "model": name}
    recipe = validate({**settings, "data": {"source": str(source), "image_size": side}}, "benchmark")
    pipeline = build_pipeline(recipe, View.of({**config, "input_size": (3, side, side)}), World(0, 1, device))
    model = create_model(name, num_classes=len(pipeline.classes))
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, recipe)
    batches = pipeline.epoch(0)
    current: list[tuple[torch.Tensor, torch.Tensor]] = []

    def work() -> None:
        images, targets = current.pop()
        with _autocast(args, device):
            logits = model(images)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    times = []
    for _ in range(min(args.rounds + 1, pipeline.steps_per_epoch)):
        waited = _seconds(lambda: current.append(next(batches)))
        times.append((waited, waited + _seconds(work)))
    return _row(f"{name}, waiting for a batch, {args.amp or 'float32'}", "its whole step", times[1:] or times)


def _step(name: str, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    model = create_model(name, num_classes=_classes(name)).to(device, memory_format=torch.channels_last).train()
    side = min(model.default_cfg["input_size"][1], 128)
    images = torch.randn(args.batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(model.num_classes, (args.batch,), device=device)
    optimizer = build_optimizer(model, Recipe(model=name))

    def run() -> None:
        with _autocast(args, device):
            logits = model(images)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _classes(name: str) -> int:
    """Of the net itself: by its name alone it would have those of its release, and its twin perhaps others."""
    own = own_cfg(name)
    return 1000 if own is None else own["num_classes"]


def _autocast(args: argparse.Namespace, device: torch.device) -> Any:
    return torch.autocast(device.type, getattr(torch, args.amp)) if args.amp else nullcontext()


def infer_rows(args: argparse.Namespace) -> list[Row]:
    """Each net without normalization beside its twin, the twin with its batch norm folded away, and timm's net.

    One image and a batch at a time, in every mode: eager, compiled, and ONNX Runtime on a CPU.
    """
    device, rows = choose_device(args.device), []
    for name in args.models or ["risotto_resnet20", "risotto_resnet18", "risotto_resnet50"]:
        twin = _with_statistics(create_model(f"{name}_bn", num_classes=_classes(f"{name}_bn")))
        ours = create_model(name, num_classes=_classes(name)).eval()
        nets = {name: ours, f"{name}_bn": twin, f"{name}_bn, folded": folded(twin)}
        plain = name.removeprefix("risotto_")
        if timm.is_model(plain):
            nets[f"timm {plain}"] = _with_statistics(create_model(plain))
        size = nets[name].default_cfg["input_size"]
        for mode in args.modes or (MODES if device.type == "cpu" else MODES[:2]):
            with tempfile.TemporaryDirectory() as folder:
                ready = [_ready(net, mode, size, device, Path(folder)) for net in nets.values()]
                for batch in (1, args.batch):
                    rows += _inference(list(nets), ready, mode, torch.randn(batch, *size), device, args)
    return rows


def _inference(
    names: list[str],
    nets: list[Callable[[torch.Tensor], torch.Tensor]],
    mode: str,
    images: torch.Tensor,
    device: torch.device,
    args: argparse.Namespace,
) -> list[Row]:
    images = images.to(device, memory_format=torch.channels_last if mode != "onnx" else torch.contiguous_format)

    def run(net: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.inference_mode(), _autocast(args, device):
            net(images)

    runs = [lambda net=net: run(net) for net in nets]
    what = f"{names[0]}, {mode}, batch {len(images)}, {args.amp or 'float32'}"
    times = _interleaved(what, runs, args.rounds)
    memory = [None if mode == "onnx" else _peak_bytes(one, device) for one in runs]
    rows = []
    for i, peer in enumerate(names[1:], start=1):
        row = _row(what, peer, [(each[0], each[i]) for each in times])
        row.images, row.memory = len(images), (memory[0], memory[i])
        rows.append(row)
    return rows


def _with_statistics(model: nn.Module) -> nn.Module:
    """The net in evaluation mode with batch statistics as if trained, so that folding has something to fold."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def folded(model: nn.Module) -> nn.Module:
    """A copy, in evaluation mode, with every batch norm folded into the convolution before it."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
            pair = getattr(parent, conv, None), getattr(parent, norm, None)
            if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d):
                setattr(parent, conv, fuse_conv_bn_eval(*pair))
                setattr(parent, norm, nn.Identity())
    return model


def _ready(
    net: nn.Module, mode: str, size: tuple[int, int, int], device: torch.device, folder: Path
) -> Callable[[torch.Tensor], torch.Tensor]:
    if mode == "onnx":
        path = folder / f"{len(list(folder.iterdir()))}.onnx"
        view = View.of(net.default_cfg)
        write_net(net, torch.randn(2, *size), path, {"classes": net.num_classes, "labels": None, **asdict(view)})
        return load_exported(path).run
    net = net.to(device, memory_format=torch.channels_last)
    return torch.compile(net) if mode == "compiled" else net


def _peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most bytes that tensors made by a run hold at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def input_rows(args: argparse.Namespace) -> list[Row]:
    """An epoch of images through both pipelines beside torchvision's ImageFolder and DataLoader on the same files."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(args.data) if args.data else _sample_folder(Path(folder))
        world = World(0, 1, choose_device(args.device))
        recipes = {
            "resident": {"augment": {"flip": True, "shift": 4}, "batch_size": args.batch},
            "streaming": {"augment": {"flip": True, "crop_scale": (0.5, 1.0)}, "batch_size": args.batch},
        }
        rows = []
        for kind, settings in recipes.items():
            data = {"source": str(source), "pipeline": kind, "image_size": args.size, "workers": args.workers}
            recipe = validate({**settings, "data": data}, "benchmark")
            config = {**own_cfg(recipe.model), "input_size": (3, args.size, args.size)}
            pipeline = build_pipeline(recipe, View.of(config), world)  # says what is wrong with the data, if anything
            peer = _torchvision_epoch(source, args, world.device, recipe.augment.crop_scale)
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


def evaluate_rows(args: argparse.Namespace) -> list[Row]:
    """From files to top-1 and loss, as `training.evaluate` does, beside the loop of timm's validation script.

    The first time a set is seen, when its decoded images are in the cache, and streamed.
    """
    device, rows = choose_device(args.device), []
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, RISOTTO_ZOO_CACHE=f"{folder}/cache"):
        source = Path(args.data) if args.data else _sample_folder(Path(folder) / "images", count=2, val=250)
        classes = open_source(str(source), False).classes
        for name in args.models or ["risotto_resnet20"]:
            model = create_model(name, num_classes=len(classes)).to(device).eval()
            view = View.of(timm.data.resolve_data_config(model=model, verbose=False))
            peer = _timm_validation(model, split_folder(source, training=False), args)

            def cached(model: nn.Module = model, view: View = view) -> None:
                images = load_set(str(source), False, view, progress=False)
                summarize(observe(model, validation_batches(images, view, World(0, 1, device))))

            def first_time(again: Callable[[], None] = cached) -> None:
                shutil.rmtree(cache_folder(), ignore_errors=True)
                again()

            def streamed(model: nn.Module = model, view: View = view) -> None:
                dataset, *_ = open_dataset(str(source), False, None, None, view.input_size[0])
                summarize(observe(model, streamed_batches(dataset, view, device, args.workers, model.num_classes, 256)))

            for label, run in (("first time", first_time), ("cached", cached), ("--stream", streamed)):
                rows.append(compare(f"{name}, {label}", run, "timm loader and loop", peer, args.rounds))
    return rows


def jobs_rows(args: argparse.Namespace) -> list[Row]:
    """A study's trainings at once beside one after another: 4 and 8 on a GPU, on a CPU as many as it has cores.

    One at a time has all cores. Every training is an epoch of new weights; starting the processes counts.
    """
    device, rows, seeds = choose_device(args.device), [], itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        images = {"source": args.data, "train_images": 4000} if args.data else None
        data = images or {"source": str(_sample_folder(Path(folder) / "images"))}
        for name in args.models or ["risotto_resnet20"]:
            settings = {"model": name, "epochs": 1, "batch_size": args.batch, "amp": args.amp, "channels_last": True}
            for count in (4, 8) if device.type == "cuda" else (cores(),):

                def train(at_once: int, count: int = count, settings: dict[str, Any] = settings) -> None:
                    recipes = [{**settings, "data": data, "seed": next(seeds)} for _ in range(count)]
                    runs = [Run("", None, None, one["seed"], False, validate(one, "benchmark")) for one in recipes]
                    list(trained(runs, at_once, args.device, max(1, cores() // at_once), Path(folder) / "runs"))

                together, alone = (lambda n=count: train(n)), (lambda: train(1))
                what = f"{count} trainings of {name} at once, {args.amp or 'float32'}"
                rows.append(compare(what, together, "one after another", alone, args.rounds))
    return rows


def _timm_validation(model: nn.Module, folder: Path, args: argparse.Namespace) -> Callable[[], None]:
    device = next(model.parameters()).device
    settings = timm.data.resolve_data_config(model=model, verbose=False)

    def run() -> None:
        loader = timm.data.create_loader(
            timm.data.create_dataset("", root=str(folder)),
            batch_size=256,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
            use_prefetcher=device.type == "cuda",
            device=device,
            **settings,
        )
        losses, top1, top5 = (timm.utils.AverageMeter() for _ in range(3))
        with torch.no_grad(), full_precision():
            for images, targets in loader:
                logits = model(images)
                losses.update(F.cross_entropy(logits, targets).item(), len(images))
                for meter, value in zip((top1, top5), timm.utils.accuracy(logits, targets, topk=(1, 5)), strict=True):
                    meter.update(value.item(), len(images))

    return run


def _torchvision_epoch(
    source: Path, args: argparse.Namespace, device: torch.device, crop_scale: tuple[float, float] | None
) -> Callable[[], None]:
    shifted = [transforms.Resize(args.size), transforms.RandomCrop(args.size, padding=4, padding_mode="reflect")]
    steps = [
        *(shifted if crop_scale is None else [transforms.RandomResizedCrop(args.size, crop_scale)]),
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


def _sample_folder(folder: Path, count: int = 2000, val: int = 20) -> Path:
    """Crops of scikit-learn's two sample photos as JPEG files of 32 px, where no data is named."""
    draw = np.random.default_rng(0)
    for name, photo in zip(("church", "flower"), load_sample_images().images, strict=True):
        for split, images in (("train", count), ("val", val)):
            (folder / split / name).mkdir(parents=True)
            for i in range(images):
                top, left = draw.integers(0, photo.shape[0] - 32), draw.integers(0, photo.shape[1] - 32)
                crop = Image.fromarray(photo[top : top + 32, left : left + 32])
                crop.save(folder / split / name / f"{i:05}.jpg", quality=75)
    return folder


BENCHMARKS = {
    "init": init_rows,
    "step": step_rows,
    "infer": infer_rows,
    "input": input_rows,
    "evaluate": evaluate_rows,
    "load": load_rows,
    "jobs": jobs_rows,
}
MODES = ("eager", "compiled", "onnx")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--models", nargs="+", help="models (init: names without risotto_); input has none")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved measurements of each side (default: 9)")
    parser.add_argument("--batch", type=int, default=128, help="images of a batch (default: 128)")
    parser.add_argument("--amp", choices=["bfloat16", "float16"], help="step, infer, jobs: autocast (default: float32)")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="infer: default all, without onnx on a GPU")
    parser.add_argument("--size", type=int, default=32, help="input: side of the images (default: 32)")
    parser.add_argument(
        "--data", help="input, step, evaluate, jobs: image folder (default: crops of two sample photos)"
    )
    parser.add_argument("--workers", type=int, default=2, help="input, evaluate: loader processes (default: 2)")
    parser.add_argument("--device", help="cpu, cuda (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if args.rounds < 2 or args.batch < 2 or args.size < 8 or args.workers < 0:
        parser.error("--rounds and --batch start at 2, --size at 8, --workers at 0")
    return args


@exits_cleanly
def main() -> None:
    args = _arguments()
    if args.json is not None:
        check_place(args.json)
    rows = BENCHMARKS[args.name](args)
    where = hardware(choose_device(args.device), 1)
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    print(f"\n{args.name} on {where}, {versions}: medians of {args.rounds} rounds")
    print(f"{'ours':48} {'seconds':>9}   {'peer':38} {'seconds':>9} {'ratio':>7}  quartiles")
    for row in rows:
        low, high = row.spread
        print(
            f"{row.what:48} {row.ours:9.4f}   {row.peer:38} {row.theirs:9.4f} {row.ratio:7.3f}  {low:.3f} to {high:.3f}"
            + (f"; {absolute(asdict(row))}" if row.images is not None else "")
        )
    if args.json is not None:
        facts = {"benchmark": args.name, "hardware": where, "torch": torch.__version__, "timm": timm.__version__}
        write(args.json, json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
