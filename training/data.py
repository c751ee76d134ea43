"""Image sets: where the images come from, and the uint8 arrays that hold a set in memory."""

import atexit
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import safetensors
import safetensors.torch
import timm.data
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from risotto_zoo.errors import UserError
from risotto_zoo.images import UnreadableImage, read_image, readable_suffixes, to_mode

from .distributed import cores

VALIDATION_FOLDERS = ("val", "validation", "test")
STREAM = "stream it: data.pipeline=streaming in training, --stream in evaluation"
DECODING = 2  # part of the cache's keys; to be raised when the same files become other arrays
_WORKER = "DataLoader worker"  # in what torch says of one
IMAGES_PER_WORKER = 100  # below, a process costs more than it saves
TIMM_SCHEMES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")


@dataclass(frozen=True)
class View:
    """How an image becomes a net's input, in timm's terms: what `resolve_data_config` returns, as far as needed."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @classmethod
    def of(cls, config: dict[str, Any]) -> "View":
        """From a timm data configuration."""
        values = {name: config[name] for name in cls.__dataclass_fields__}
        channels = values["input_size"][0]
        for name in ("mean", "std"):  # a model made for another number of channels keeps the averages
            if len(values[name]) != channels:
                values[name] = (sum(values[name]) / len(values[name]),) * channels
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def transform(self, size: int | None = None, whole: bool = False) -> Callable[[Image.Image], Tensor]:
        """timm's evaluation transform up to the uint8 array, shape (C, H, W); `whole` keeps the largest square."""
        side = size or self.input_size[1]
        steps = create_transform(
            (self.input_size[0], side, side),
            is_training=False,
            use_prefetcher=True,  # ends in a uint8 array: normalization is left to the device
            interpolation=self.interpolation,
            crop_pct=1.0 if whole else self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return lambda image: torch.as_tensor(steps(image))  # an array in older versions of timm


@dataclass
class ImageSet:
    """Images in memory: uint8, shape (N, C, H, W), with targets of shape (N,)."""

    images: Tensor
    targets: Tensor
    classes: list[str]
    unreadable: list[str] = field(default_factory=list)  # "file (reason)" of each image left out

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor) -> "ImageSet":
        return ImageSet(self.images[indices], self.targets[indices], self.classes, self.unreadable)


def normalized(images: Tensor, view: View) -> Tensor:
    """uint8 images (N, C, H, W) as the model's inputs."""
    mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (view.mean, view.std))
    return (images.float() / 255 - mean) / std


def load_set(
    source: str,
    training: bool,
    view: View,
    *,
    size: int | None = None,
    split: str | None = None,
    root: str | None = None,
    progress: bool = True,
) -> ImageSet:
    """Decode a whole set into memory, or read it back from the cache on disk.

    Args:
        source: 'digits', an image folder, or a timm data set string.
        training: The training part, or the one to validate on.
        view: Resizing and cropping.
        size: Side of the stored images, whole; the view's own size and crop if None.
        split: Of a timm data set string, or a sub-folder; train, or validation, if None.
        root: Of a timm data set string.
        progress: Show a progress bar.

    Raises:
        UserError: If the source is missing, empty, a folder of one class only, holds nothing readable, or does not fit
            in 60% of the free memory.
    """
    transform = view.transform(size, whole=size is not None)
    channels = view.input_size[0]
    if source == "digits":
        if split not in (None, _split(training)) or root is not None:
            raise UserError(f"digits has no split {split}" if root is None else "digits has no root")
        return _digits(training, transform, channels)
    reader = open_source(source, training, split, root)
    side = size or view.input_size[1]
    _check_memory(len(reader), channels * side * side, psutil.virtual_memory().available, source)
    part = {"training": training, "split": split, "root": root}
    key = None
    if reader.files is not None:
        key = _cache_key(reader, {**part, "size": size, **asdict(view), "mean": None, "std": None})
    shape = (channels, side, side)
    if key is None:
        result = _decode(reader, transform, channels, shape, progress)
    elif (result := _read_cache(key)) is None:
        with _alone():  # of several trainings begun at once one decodes, and the others read
            if (result := _read_cache(key)) is None:
                result = _decode(reader, transform, channels, shape, progress)
                _write_cache(key, result)
    return replace(result, unreadable=[*result.unreadable, *reader.skipped])


def check_device_memory(images: ImageSet, device: torch.device) -> None:
    """Refuse to move a set to a GPU whose free memory it would fill by more than 60%.

    Raises:
        UserError: naming the streaming pipeline.
    """
    if device.type == "cuda":
        per_image = images.images[0].numel()
        _check_memory(len(images), per_image, torch.cuda.mem_get_info(device)[0], str(device))


@dataclass
class Source:
    """A listed but not yet decoded set."""

    name: str
    samples: Sequence[Any]  # (file, class index), or positions in `dataset`
    classes: list[str]
    dataset: Any = None  # a timm data set, for sources that are no plain folders
    files: list[str] | None = None  # all that the set is read from, if that is known
    skipped: tuple[str, ...] = ()  # images of kinds that timm does not read from folders, each with the reason

    def __len__(self) -> int:
        return len(self.samples)

    def listing(self) -> str:
        """Checksum of the files' names within the folder and of their classes; of the number of images elsewhere."""
        names = [len(self)]
        if self.dataset is None:
            names = [(file.removeprefix(self.name), target) for file, target in self.samples]
        return hashlib.blake2b(json.dumps(names).encode(), digest_size=16).hexdigest()

    def read(self, position: int, channels: int) -> tuple[Image.Image, int]:
        """An image, in mode L for one channel and RGB else, and the index of its class.

        Raises:
            UnreadableImage: If it cannot be read or has no label; the message names it.
        """
        name = self.samples[position][0] if self.dataset is None else f"{self.name}, image {position}"
        try:
            if self.dataset is not None and not hasattr(self.dataset, "reader"):  # one of torchvision's
                image, target = self.dataset[position]
                image = to_mode(image, channels)
            else:
                # Past timm's own data set, which puts the next image in the place of one that is broken.
                file, target, *_ = (self.samples if self.dataset is None else self.dataset.reader)[position]
                image = read_image(file, channels)
        except Exception as error:  # each reader raises its own kinds
            raise UnreadableImage(f"{name} ({error})") from None
        if target is None or target < 0:
            raise UnreadableImage(f"{name} (it has no label)")
        return image, int(target)


def open_source(source: str, training: bool, split: str | None = None, root: str | None = None) -> Source:
    """List a folder or a timm data set.

    Raises:
        UserError: If it is missing, empty or a folder of one class only, or a root is given for a folder.
    """
    if source.startswith(TIMM_SCHEMES):
        dataset = timm_dataset(source, training, split, root)
        if isinstance(dataset, IterableDataset):
            raise UserError(f"{source} can only be read in order; {STREAM}")
        classes = class_names(dataset) or _counted_classes(dataset)
        listed = getattr(dataset, "samples", None)  # torchvision's sets of one file an image
        files = [str(path) for path, *_ in listed] if listed else None
        return Source(source, range(len(dataset)), classes, dataset, files)
    if root is not None:
        raise UserError(f"{source} is a folder, which has no root; a timm data set string ({TIMM_SCHEMES[0]}...) has")
    folder = split_folder(Path(source), training, split)
    if folder.suffix == ".tar":
        dataset = timm_dataset(str(folder), training, split, None)
        classes = sorted(dataset.reader.class_name_to_idx, key=dataset.reader.class_name_to_idx.get)
        return Source(str(folder), range(len(dataset)), classes, dataset, [str(folder)])
    try:
        reader = timm.data.create_dataset("", root=str(folder)).reader
    except RuntimeError:  # timm found no image in any sub-folder
        raise UserError(f"{folder} holds no images; it needs one sub-folder of images for each class") from None
    classes = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    if len(classes) < 2:
        only = f" ({classes[0]})" if classes[0] else ""  # images that lie in the folder itself have no name
        raise UserError(f"{folder} has one class only{only}; it needs a sub-folder for each of two or more")
    files = [path for path, _ in reader.samples]
    for place in sorted({os.path.dirname(path) for path in files}):
        parts = Path(place).relative_to(folder).parts
        if not parts or any(part.startswith(".") for part in parts):  # what a tool keeps to itself, such as thumbnails
            where = "a hidden folder" if parts else "no class folder"
            raise UserError(f"{place} is {where}, but holds images, which would count; move them away")
    return Source(str(folder), list(reader.samples), classes, files=files, skipped=_other_kinds(folder))


def _other_kinds(folder: Path) -> tuple[str, ...]:
    """Images in a folder that timm's reader passes over by their suffix, so that nobody misses them unawares."""
    kinds = readable_suffixes() - timm.data.get_img_extensions(as_set=True)
    found = [
        os.path.join(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in kinds
    ]
    known = ", ".join(timm.data.get_img_extensions())
    return tuple(f"{path} (timm reads {known} from folders)" for path in sorted(found))


def timm_dataset(source: str, training: bool, split: str | None, root: str | None, **options: Any) -> Any:
    """`timm.data.create_dataset`, its errors in one line."""
    try:
        split = split or _split(training)
        if source.endswith(".tar"):
            return timm.data.create_dataset("", root=source, **options)
        return timm.data.create_dataset(source, root=root, split=split, **options)
    except Exception as error:  # each reader fails in its own way
        reason = str(error).split("\n")[0] or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            hint = f"; pip install {error.name}"
        else:
            hint = "; it may need a root (training: --set data.root=FOLDER)" if root is None else ""
        raise UserError(f"data set {source} cannot be opened: {reason}{hint}") from None


def _split(training: bool) -> str:
    return "train" if training else "validation"


def split_folder(folder: Path, training: bool, split: str | None = None) -> Path:
    """The sub-folder or tar file to train or to validate on; a folder of classes alone is one to validate on.

    Raises:
        UserError: If there is none, or none of the name `split`.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"data folder {folder} is a file; name the folder that holds the images")
    if not folder.is_dir():
        raise UserError(
            f"data folder {folder} does not exist; unpack the images there, or name another (training: "
            "--set data.source=...)"
        )
    named = split not in (None, _split(training))
    names = (split,) if named else ("train",) if training else VALIDATION_FOLDERS
    for name in names:
        for path in (folder / name, folder / f"{name}.tar"):
            if path.exists():
                return path
    if named:
        there = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir() or path.suffix == ".tar"))
        raise UserError(f"{folder} has no sub-folder {split}; it has {there or 'none'}")
    if training:
        raise UserError(
            f"{folder} has no sub-folder train; it needs train and val (or test), one folder a class in each"
        )
    if (folder / "train").is_dir():
        names = ", ".join(VALIDATION_FOLDERS)
        raise UserError(f"{folder} has no sub-folder {names} to validate on (training: or set data.holdout=0.1)")
    return folder


def class_names(dataset: Any) -> list[str] | None:
    """What a timm data set calls its classes, if it does; torchvision's ImageNet has several names for each."""
    classes = getattr(getattr(dataset, "dataset", dataset), "classes", None)
    return [name if isinstance(name, str) else ", ".join(name) for name in classes] if classes else None


def _counted_classes(dataset: Any) -> list[str]:
    classes = 1 + max(int(dataset[i][1]) for i in range(len(dataset)))
    return [str(i) for i in range(classes)]


def _digits(training: bool, transform: Callable, channels: int) -> ImageSet:
    """scikit-learn's 1,797 scanned digits of 8x8 pixels; a fifth of each class, always the same, is for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0, shuffle=True
    )
    images, targets = (parts[0], parts[2]) if training else (parts[1], parts[3])
    grey = (images * (255 / 16)).round().astype("uint8")
    arrays = [transform(to_mode(Image.fromarray(image), channels)) for image in grey]
    return ImageSet(torch.stack(arrays), torch.as_tensor(targets).long(), [str(name) for name in digits.target_names])


@dataclass
class _Decoded(Dataset):
    """Array, class and problem of each image of a source."""

    source: Source
    transform: Callable
    channels: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> tuple[Any, int, str]:
        try:
            image, target = self.source.read(position, self.channels)
            return self.transform(image).numpy(), target, ""  # a tensor would pass through shared memory
        except UnreadableImage as error:
            return None, -1, str(error)
        except Exception as error:  # what the transform makes of a strange size
            return None, -1, f"{self.source.name}, image {position} ({error})"


def _decode(
    source: Source, transform: Callable, channels: int, shape: tuple[int, int, int], progress: bool
) -> ImageSet:
    """Decode in several processes, where they can be forked: the work on a small image is mostly Python's.

    Raises:
        UserError: If nothing can be read, or one of the processes is killed.
    """
    count = len(source)
    # timm's readers share file handles, which only one process at a time may move.
    alone = sys.platform != "linux" or source.dataset is not None
    workers = 0 if alone else min(cores(), count // IMAGES_PER_WORKER)
    loader = DataLoader(
        _Decoded(source, transform, channels),
        batch_size=64,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    images, targets = torch.empty(count, *shape, dtype=torch.uint8), torch.full((count,), -1)
    unreadable = []
    with loader_faults(f"decoding {source.name}", STREAM):
        results = itertools.chain.from_iterable(loader)  # which starts the processes
        for i, (array, target, problem) in enumerate(_bar(results, count, f"decoding {source.name}", progress)):
            if problem:
                unreadable.append(problem)
            else:
                images[i], targets[i] = torch.from_numpy(array), target
    if len(unreadable) == count:
        raise UserError(f"none of the {count} images in {source.name} can be read; the first is {unreadable[0]}")
    if unreadable:
        images, targets = images[targets >= 0], targets[targets >= 0]
    return ImageSet(images, targets, source.classes, unreadable)


def ignore_signals(_worker: int) -> None:
    """In each loader process: signals are its parent's business, which still needs it, and so is its parent's end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # By this hook multiprocessing would print that its parent hung up while it was handed a batch.
    sys.excepthook = lambda *_: None


@atexit.register
def _end_loaders() -> None:
    """Python's own end of a process asks its children by SIGTERM, and would wait for those that ignore it."""
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take their end for a fault
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


@contextmanager
def loader_faults(what: str, mend: str) -> Iterator[None]:
    """What torch makes of a loader process that was killed, or found no image to read, in one line.

    Args:
        what: What was being done.
        mend: What helps if it was killed for its memory.
    Raises:
        UserError: In the place of torch's errors.
    """
    try:
        yield
    except UserError as error:  # with its whole traceback as text, if a process raised it
        if _WORKER not in str(error):
            raise
        raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from None
    except RuntimeError as error:
        if not str(error).startswith(_WORKER):
            raise
        raise UserError(f"{what}: {str(error).splitlines()[0]}; if memory ran out, {mend}") from None


def _bar(iterable: Iterator, total: int, what: str, show: bool) -> Iterator:
    return tqdm(iterable, what, total, unit="img", disable=None if show else True, leave=False, dynamic_ncols=True)


def _check_memory(count: int, image_bytes: int, free: int, where: str) -> None:
    need = count * image_bytes
    if need > 0.6 * free:
        raise UserError(
            f"{count} images of {image_bytes} bytes take {need / 2**30:.1f} GiB, more than 60% of the "
            f"{free / 2**30:.1f} GiB free for {where}; {STREAM}"
        )


# --- the cache on disk: one file a set, named by what is in the source and how it was decoded


def cache_folder() -> Path:
    """`$RISOTTO_ZOO_CACHE`, or `risotto-zoo` in the user's cache folder, or that of temporary files where none is."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):  # a user without a home, as in a container
        base = tempfile.gettempdir()
    return Path(os.environ.get("RISOTTO_ZOO_CACHE") or Path(base) / "risotto-zoo")


@contextmanager
def _alone() -> Iterator[None]:
    """Wait for other processes that fill the cache, where the system and its disk can do so."""
    with ExitStack() as held:
        with suppress(ImportError, OSError):  # Windows; a disk that cannot lock, or is read-only
            import fcntl

            cache_folder().mkdir(parents=True, exist_ok=True)
            handle = os.open(cache_folder(), os.O_RDONLY)
            held.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _cache_key(source: Source, settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([DECODING, source.name, source.classes, settings]).encode())

    def fingerprint(path: str) -> bytes:
        try:
            with open(path, "rb") as file:
                content = hashlib.blake2b(digest_size=16)
                while block := file.read(1 << 20):
                    content.update(block)
        except OSError:  # a dangling link, say: it is named when it is decoded
            return os.fsencode(path) + b"\0unreadable"
        return os.fsencode(path) + b"\0" + content.digest()

    with ThreadPoolExecutor(cores()) as pool:
        for part in pool.map(fingerprint, source.files, chunksize=64):
            digest.update(part)
    return digest.hexdigest()[:32]


def _read_cache(key: str) -> ImageSet | None:
    path = cache_folder() / f"{key}.safetensors"
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            stated = facts.pop("checksum")
            images = ImageSet(file.get_tensor("images"), file.get_tensor("targets"), **facts)
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        return None  # absent or not whole: decode again
    return images if stated == checksum(images) else None


def checksum(images: ImageSet) -> str:
    """Of the images and their targets."""
    digest = hashlib.blake2b(images.images.numpy(), digest_size=16)
    digest.update(images.targets.numpy())
    return digest.hexdigest()


def _write_cache(key: str, images: ImageSet) -> None:
    facts = {"classes": images.classes, "unreadable": images.unreadable, "checksum": checksum(images)}
    tensors = {"images": images.images, "targets": images.targets}
    temporary = None
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache_folder(), prefix=f"{key}.")
        os.close(handle)
        safetensors.torch.save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})
        os.replace(temporary, cache_folder() / f"{key}.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        tqdm.write(f"the decoded images could not be cached in {cache_folder()}: {error}", file=sys.stderr)
    finally:  # Ctrl-C, too
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
