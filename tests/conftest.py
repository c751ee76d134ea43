"""Shared by the tests: options, skips with their reasons, a small real image folder, and commands run in process."""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from hub_server import TOKEN, Hub

# Every process of the tests, and all that it starts, has this Hub for its Hub; the client reads these once, on import.
HUB = Hub().start()
os.environ.update(HF_ENDPOINT=HUB.url, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
for name in (
    "HF_HUB_OFFLINE",
    "HF_HUB_CACHE",
    "HF_HUB_ETAG_TIMEOUT",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "RISOTTO_ZOO_ORG",
):
    os.environ.pop(name, None)

os.environ["OMP_NUM_THREADS"] = "1"  # two test processes on two cores: more threads would wait for each other

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import risotto_zoo  # noqa: F401  registers the models

REPOSITORY = Path(__file__).parent.parent
CIFAR = REPOSITORY / ".data" / "cifar10-jpeg"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


# One process works a file off, so the longest come first; the other way round the last would be waited for.
LONGEST = ("test_distributed.py", "test_training.py", "test_hub.py", "test_risotto.py", "test_zoo.py")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: (*LONGEST, item.path.name).index(item.path.name))
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "data" in item.keywords and not CIFAR.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"{CIFAR} is not there; see Data in README.md"))


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RISOTTO_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # for processes that a test starts
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))


@pytest.fixture
def hub(monkeypatch) -> Hub:
    """An empty Hub whose token we have; its faults come without the waits of the client's retries."""
    HUB.reset()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    return HUB


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys, monkeypatch) -> Callable[..., Result]:
    """Run a command's main in this process: exit code, standard output and error."""

    def run(main: Callable[[], None], *args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Result(stop.value.code or 0, captured.out, captured.err)

    return run


class _Here:
    """A pool of no processes: what is submitted runs at once."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def no_processes(monkeypatch):
    """Let the trainings of studies run in this process."""
    monkeypatch.setattr("training.grid.ProcessPoolExecutor", _Here)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory) -> Path:
    """Crops of scikit-learn's two sample photos as an image folder: train and val, two classes, 24 and 8 images."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for name, photo in zip(("church", "flower"), load_sample_images().images, strict=True):
        for split, count in (("train", 24), ("val", 8)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                top, left = draw.integers(0, photo.shape[0] - 64), draw.integers(0, photo.shape[1] - 64)
                crop = Image.fromarray(photo[top : top + 64, left : left + 64])
                crop.resize((40, 40)).save(folder / f"{i:03}.jpg", quality=90)
    return root
