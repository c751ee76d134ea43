"""Two ways from images to batches: held in memory and augmented on the device, or streamed by timm's loaders."""

import inspect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import timm.data
import timm.utils
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from risotto_zoo.errors import UserError, did_you_mean
from risotto_zoo.images import UnreadableImage

from .augment import Draw, augmented, draw, generator_of, mixed
from .console import say
from .data import (
    TIMM_SCHEMES,
    ImageSet,
    Source,
    View,
    check_device_memory,
    checksum,
    class_names,
    ignore_signals,
    load_set,
    normalized,
    open_source,
    timm_dataset,
)
from .distributed import World
from .recipe import Data, Recipe

EVAL_BATCH = 500


class Pipeline(Protocol):
    """What the engine needs: batches of one epoch from any step on, and the validation batches of this process."""

    classes: list[str]
    train_size: int
    val_size: int
    steps_per_epoch: int
    contents: list[str]  # checksums of what there is to train on and to validate on
    unreadable: list[str]  # what is left out, and why

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images, shape (B, C, H, W), and target distributions, (B, K), of this process, on its device."""

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images and class indices, (B,); together the processes see each image once, but of a set that is read
        in order what its reader gives each."""


def build_pipeline(recipe: Recipe, view: View, world: World) -> Pipeline:
    """The pipeline the recipe asks for."""
    return (Resident if recipe.data.pipeline == "resident" else Streaming)(recipe, view, world)


def eval_batch(view: View) -> int:
    """How many images of this size are evaluated at once."""
    return max(16, min(EVAL_BATCH, EVAL_BATCH * 64**2 // view.input_size[1] ** 2))


def validation_batches(
    images: ImageSet, view: View, world: World, size: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized batches of every world.size-th image, beginning at world.rank."""
    for part in torch.arange(len(images))[world.rank :: world.size].split(size or eval_batch(view)):
        yield normalized(images.images[part].to(world.device), view), images.targets[part].to(world.device)


def resident_sets(data: Data, view: View, progress: bool = True) -> tuple[ImageSet, ImageSet]:
    """The images to train on and those to validate on, as the recipe's data section says."""
    load = {"root": data.root, "progress": progress}
    train = load_set(data.source, True, view, size=data.stored_size, split=data.train_split, **load)
    if data.train_images is not None:
        if data.train_images > len(train):
            raise UserError(f"data.train_images: there are only {len(train)} training images in {data.source}")
        train = train.subset(torch.randperm(len(train), generator=generator_of("subset"))[: data.train_images])
    if data.holdout:
        order = torch.randperm(len(train), generator=generator_of("holdout"))
        held = round(data.holdout * len(train))
        if held == 0 or held == len(train):
            raise UserError(f"data.holdout: {data.holdout} of {len(train)} images leaves one part empty")
        val, train = train.subset(order[:held]), train.subset(order[held:])
        if data.stored_size is not None:
            val.images = _resized(val.images, view.input_size[1])
        return train, val
    val = load_set(data.source, False, view, split=data.val_split, **load)
    if train.classes != val.classes:
        raise _other_classes(train.classes, val.classes, data.source)
    if train.images.shape == val.images.shape and torch.equal(train.images, val.images):
        raise _same_images(data.source)
    return train, val


def validation_set(data: Data, view: View) -> ImageSet:
    """The images that a run with this data section is validated on."""
    if data.holdout:
        return resident_sets(data, view)[1]
    return load_set(data.source, False, view, split=data.val_split, root=data.root)


class Resident:
    """The whole set as bytes on the training device."""

    def __init__(self, recipe: Recipe, view: View, world: World) -> None:
        data = recipe.data
        self.recipe, self.view, self.world = recipe, view, world
        if world.main:  # the others then read its cache file
            train, val = resident_sets(data, view, progress=True)
        world.barrier()
        if not world.main:
            train, val = resident_sets(data, view, progress=False)
        self.classes, self.val = train.classes, val
        self.unreadable = list(dict.fromkeys(train.unreadable + val.unreadable))  # a held-out part tells the same
        self.train_size, self.val_size = len(train), len(val)
        self.contents = [checksum(train), checksum(val)]
        self.steps_per_epoch = _steps(recipe, len(train), world)
        check_device_memory(train, world.device)
        self.images, self.targets = train.images.to(world.device), train.targets.to(world.device)
        self.mean, self.std = (torch.tensor(values, device=world.device) for values in (view.mean, view.std))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        recipe, world = self.recipe, self.world
        order = torch.randperm(self.train_size, generator=generator_of(recipe.seed, "order", epoch))
        share = recipe.batch_size // world.size
        mine = slice(world.rank * share, (world.rank + 1) * share)
        mixes = recipe.augment.mixup > 0 or recipe.augment.cutmix > 0
        for step in range(start, self.steps_per_epoch):
            index = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            draws = draw(recipe.batch_size, recipe.augment, generator_of(recipe.seed, "augment", epoch, step))
            own = draws.rows(mine)
            images, targets = self._batch(index[mine], own)
            if mixes:
                partners, other = self._batch(index[own.partner], draws.rows(own.partner))
                images, portion = mixed(images, partners, own.to(world.device))
                targets = targets * portion[:, None] + other * (1 - portion[:, None])
            yield images, targets

    def _batch(self, index: Tensor, draws: Draw) -> tuple[Tensor, Tensor]:
        device, size = self.world.device, self.recipe.data.train_size or self.view.input_size[1]
        index = index.to(device, non_blocking=True)
        images = augmented(self.images, index, size, self.recipe.augment, draws.to(device), self.mean, self.std)
        return images, F.one_hot(self.targets[index], len(self.classes)).float()

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        return validation_batches(self.val, self.view, self.world)


# Arguments of timm's loader that other keys of the recipe, or the run, set for training and validation alike.
_ELSEWHERE = {
    "input_size": "data.image_size, data.train_size",
    "batch_size": "batch_size",
    "mean": "the model",
    "std": "the model",
    "interpolation": "the model",
    "crop_pct": "data.crop_pct",
    "crop_mode": "the model",
    "scale": "augment.crop_scale",
    "hflip": "augment.flip",
    "no_aug": "augment",
    "num_workers": "data.workers",
    "device": "--device",
    "use_prefetcher": "--device",
    "distributed": "torchrun",
}


class Streaming:
    """timm's data sets and loaders with worker processes."""

    def __init__(self, recipe: Recipe, view: View, world: World) -> None:
        data = recipe.data
        self.recipe, self.view, self.world = recipe, view, world
        for key, place in _ELSEWHERE.items():
            if key in data.loader:
                raise UserError(f"data.loader.{key}: {place} decides that")
        ours = {"dataset", "worker_seeding", "collate_fn", "num_aug_splits", "is_training", *_ELSEWHERE}
        known = inspect.signature(timm.data.create_loader).parameters.keys() - ours
        for key in data.loader:
            if key not in known:
                hint = did_you_mean(key, known)
                raise UserError(f"data.loader.{key}: timm.data.create_loader takes no such argument{hint}")
        self.unreadable: list[str] = []  # by their kind; one that is broken is named when it is read
        self.train = self._open(True, data.train_split)
        self.val = self._open(False, data.val_split)
        if world.main and world.size > 1 and isinstance(self.val, IterableDataset):
            say(f"validation is approximate: {data.source} is read in order, and its reader shares it out by shards")
        if isinstance(self.val, Listed):
            self.val.check()
            if (files := self.val.source.files) is not None and files == self.train.source.files:
                raise _same_images(data.source)
        self.train_size, self.val_size = _images(self.train), _images(self.val)
        self.contents = [part.source.listing() for part in (self.train, self.val) if isinstance(part, Listed)]
        self.steps_per_epoch = _steps(recipe, self.train_size, world)
        try:
            self._training_loader(self.train)
        except Exception as error:  # timm checks its arguments in many places
            reason = str(error) or type(error).__name__
            raise UserError(f"data.loader: timm refuses {data.loader} ({reason})") from None

    def _open(self, training: bool, split: str) -> Dataset:
        data = self.recipe.data
        options = {"batch_size": self.recipe.batch_size // self.world.size, "seed": self.recipe.seed}
        dataset, classes, skipped = open_dataset(
            data.source, training, split, data.root, self.view.input_size[0], **options
        )
        self.unreadable += skipped
        if training:
            count = self.recipe.model_args.get("num_classes")
            if classes is None and count is None:
                raise UserError(f"{data.source} does not say how many classes it has; set model_args.num_classes")
            self.classes = classes or [str(i) for i in range(count)]
        elif classes not in (None, self.classes):
            raise _other_classes(self.classes, classes, data.source)
        return dataset

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        recipe, world = self.recipe, self.world
        part = self.train
        if isinstance(part, IterableDataset):  # its reader shards and shuffles by itself
            part.set_epoch(epoch)
        else:
            order = torch.randperm(self.train_size, generator=generator_of(recipe.seed, "order", epoch))
            part = _Part(part, order[world.rank : self.steps_per_epoch * recipe.batch_size : world.size].tolist())
        loader = self._training_loader(part)
        mixes = recipe.augment.mixup > 0 or recipe.augment.cutmix > 0
        batches = itertools.chain.from_iterable(itertools.repeat(loader))  # again, should a reader run short
        largest = torch.full((1,), -1, device=world.device)
        for step in range(self.steps_per_epoch):
            # Order, workers' seeds and, without workers, transforms draw from the global generators: as functions of
            # the step they repeat the epoch's stream on resuming, which runs through the batches before `start`.
            timm.utils.random_seed(generator_of(recipe.seed, "loader", epoch, step, world.rank).initial_seed() % 2**32)
            images, targets = next(batches)
            if epoch == 0:  # one epoch sees every label
                largest = torch.maximum(largest, targets.max().to(world.device))
                # It waits for the device, as the trainer has just done at these steps.
                if step % recipe.log_every == 0 or step + 1 == self.steps_per_epoch:
                    _check_labels(largest, len(self.classes))
            if step < start:
                continue
            images = images.to(world.device, non_blocking=True)
            targets = targets.to(world.device).clamp(max=len(self.classes) - 1)
            targets = F.one_hot(targets, len(self.classes)).float()
            if mixes:
                draws = draw(len(images), recipe.augment, generator_of(recipe.seed, "augment", epoch, step, world.rank))
                draws = draws.to(world.device)
                images, portion = mixed(images, images[draws.partner], draws)
                targets = targets * portion[:, None] + targets[draws.partner] * (1 - portion[:, None])
            yield images, targets

    def _training_loader(self, part: Dataset) -> Iterable:
        augment = self.recipe.augment  # and nothing else: timm's own default changes colours
        options: dict[str, Any] = {
            "hflip": 0.5 if augment.flip else 0.0,
            "scale": augment.crop_scale,
            "color_jitter": None,
        }
        side = self.recipe.data.train_size or self.view.input_size[1]
        return _timm_loader(
            part,
            replace(self.view, input_size=(self.view.input_size[0], side, side)),
            self.recipe.batch_size // self.world.size,
            True,
            self.world.device,
            self.recipe.data.workers,
            {**options, **self.recipe.data.loader},
        )

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        part = self.val
        if not isinstance(part, IterableDataset):
            part = _Part(part, list(range(self.world.rank, self.val_size, self.world.size)))
        return streamed_batches(part, self.view, self.world.device, self.recipe.data.workers, len(self.classes))


def _images(dataset: Dataset) -> int:
    """Of all processes together; the length of a timm data set that is read in order is one process's share."""
    return getattr(getattr(dataset, "reader", None), "num_samples", None) or len(dataset)


def _check_labels(targets: Tensor, classes: int) -> None:
    if len(targets) and int(targets.max()) >= classes:
        raise UserError(f"an image is of class {int(targets.max())}, but the net knows classes 0 to {classes - 1}")


def open_dataset(
    source: str, training: bool, split: str | None, root: str | None, channels: int, **options: Any
) -> tuple[Dataset, list[str] | None, tuple[str, ...]]:
    """A data set to stream, its classes as far as it names them, and the images that are of kinds timm does not read.

    Args:
        source: An image folder, or a timm data set string.
        training: The training part, or the one to validate on.
        split: Of a timm data set string, or a sub-folder; train, or validation, if None.
        root: Of a timm data set string.
        channels: 1 for grey images, 3 for RGB.
        options: Further arguments of `timm.data.create_dataset`, for sets that are read in order.

    Raises:
        UserError: If it is missing, empty, or small enough to be held in memory by nature.
    """
    if source == "digits":
        raise UserError("digits is small and not streamed; hold it in memory (data.pipeline: resident)")
    if not source.startswith(TIMM_SCHEMES):
        found = open_source(source, training, split, root)
        return Listed(found, channels, training), found.classes, found.skipped
    mode = "L" if channels == 1 else "RGB"
    dataset = timm_dataset(source, training, split, root, is_training=training, input_img_mode=mode, **options)
    names = class_names(dataset)
    if not isinstance(dataset, IterableDataset):
        dataset = Listed(Source(source, range(len(dataset)), names or [], dataset), channels, training)
    return dataset, names, ()


def streamed_batches(
    dataset: Dataset, view: View, device: torch.device, workers: int, classes: int, size: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized batches through timm's loader, in the set's order; what cannot be read is left out and counted.

    Raises:
        UserError: If a label is not below `classes`.
    """
    missing = 0
    for images, targets in _timm_loader(dataset, view, size or eval_batch(view), False, device, workers, {}):
        _check_labels(targets, classes)
        readable = targets >= 0
        missing += int((~readable).sum())
        yield images[readable].to(device), targets[readable].to(device)
    if missing:
        say(f"{missing} images could not be read and are left out")


def _timm_loader(
    dataset: Dataset,
    view: View,
    batch: int,
    training: bool,
    device: torch.device,
    workers: int,
    options: dict[str, Any],
) -> Iterable:
    settings = {
        "interpolation": view.interpolation,
        "mean": view.mean,
        "std": view.std,
        "crop_pct": view.crop_pct,
        "crop_mode": view.crop_mode,
        "num_workers": workers,
        "use_prefetcher": device.type == "cuda",
        "pin_memory": device.type == "cuda",
        "device": device,
        "persistent_workers": False,
        "worker_seeding": _seed_worker,
    }
    return timm.data.create_loader(dataset, view.input_size, batch, training, **{**settings, **options})


def _seed_worker(info: Any) -> int:
    ignore_signals(info.id)
    return info.seed


class Listed(Dataset):
    """The images of a listed set, read as everywhere here. An unreadable one is named; in training the next takes its
    place, in validation it comes as a black image of class -1."""

    def __init__(self, source: Source, channels: int, training: bool) -> None:
        self.source, self.channels, self.training = source, channels, training
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.source)

    def check(self) -> None:
        """Refuse a set without a readable image, which to find takes no longer than the first of them."""
        reader = getattr(self.source.dataset, "reader", None)
        if keeps := getattr(reader, "cache_tarfiles", False):  # loader processes would share its place in an open file
            reader.cache_tarfiles = False
        try:
            for index in range(len(self)):
                try:
                    self.source.read(index, self.channels)
                    return
                except UnreadableImage:
                    pass
        finally:
            if keeps:
                reader.cache_tarfiles = True
        raise UserError(f"none of the {len(self)} validation images can be read")

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for step in range(len(self)):
            try:
                image, target = self.source.read((index + step) % len(self), self.channels)
                return self.transform(image), target
            except UnreadableImage as error:
                say(f"left out {error}")
                if not self.training:
                    return self.transform(Image.new("L" if self.channels == 1 else "RGB", (8, 8))), -1
        raise UserError("none of the training images can be read")


class _Part(Subset):
    """A subset that hands the transform timm's loader sets on to its data set."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "transform":
            self.dataset.transform = value
        else:
            super().__setattr__(name, value)


def _steps(recipe: Recipe, images: int, world: World) -> int:
    """Steps of an epoch; the images that fill no whole batch wait for another epoch's order."""
    if recipe.batch_size % (world.size * recipe.accumulate):
        raise UserError(
            f"batch_size {recipe.batch_size} cannot be split over {world.size} processes "
            f"with accumulate {recipe.accumulate}"
        )
    if images < recipe.batch_size:
        raise UserError(f"batch_size {recipe.batch_size} is more than the {images} training images")
    return images // recipe.batch_size


def _other_classes(train: list[str], val: list[str], source: str) -> UserError:
    differing = sorted(set(train) ^ set(val))
    return UserError(f"{source}: training and validation have different classes, such as {', '.join(differing[:3])}")


def _same_images(source: str) -> UserError:
    """timm reads all of a set's files for a split that has no sub-folder."""
    return UserError(f"{source}: training and validation have the same images; set data.holdout to keep some apart")


def _resized(images: Tensor, size: int) -> Tensor:
    """Held-out images are stored like training images; validation sees them whole at the net's input size."""
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)
