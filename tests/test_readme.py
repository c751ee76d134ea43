"""Every command of the README and of the released models' cards runs as it stands there.

But for the size of the trainings and the names in capitals.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import training.evaluate
import training.export
import training.publish
import training.release
import training.train
from risotto_zoo import cli
from risotto_zoo.hub import MANIFEST
from training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def sections(page):
    return dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.S | re.M))


SECTIONS = sections(README)
PROGRAMS = {"train", "evaluate", "release", "publish", "export"}
# Not 8 px: bfloat16 on a CPU with AMX reads uninitialized memory for the weights of a strided kernel on maps of 1 px.
TINY = ["epochs=1", "batch_size=40", "warmup_epochs=0", "data.image_size=32", "augment.shift=1"]
TINY += ["data.train_size=null", "data.stored_size=null"]
ELSEWHERE = {  # commands that run somewhere else, and where
    "python3 -m venv": "in CI",
    ".venv/bin/python": "in CI",
    "torchrun": "with two processes in test_distributed.py",
    "export TORCH": "with two of torchrun in test_distributed.py",
    "python train.py": "in a checkout of timm",
    "python validate.py": "in a checkout of timm",
    "python benchmark.py": "in a checkout of timm",
    'python -c "import runpy': "below, with a script of our own",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Scans of digits as an image folder: train and val, ten classes, 8 and 2 images each."""
    root, digits = tmp_path_factory.mktemp("images"), load_digits()
    for label in range(10):
        chosen = digits.images[digits.target == label][:10]
        for i, scan in enumerate(chosen):
            folder = root / ("val" if i < 2 else "train") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((scan * 15).astype(np.uint8)).convert("RGB").save(folder / f"{i}.png")
    return root


@pytest.fixture
def home(hub, images, tmp_path, monkeypatch):
    """A folder to work in as the README's reader would in a checkout, with the Hub at hand."""
    for name in ("model_cards", "training", "risotto_zoo"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(section, language):
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.S | re.M)


def commands(section):
    """The lines of a section's bash blocks, without comments, those that continue put together."""
    lines = "\n".join(blocks(section, "bash")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^| )# .*", "", line).strip() for line in lines]
    return [line for line in lines if line and not line.startswith(tuple(ELSEWHERE))]


def run(line, images, command, **values):
    """One line of bash in this process; `values` are what names in capitals stand for."""
    values = {"IMAGE_OR_FOLDER": images / "val", "IMAGE": images / "val" / "0" / "0.png", "FOLDER": images} | values
    values |= {"MODEL": "risotto_resnet20.cifar10-jpeg", "OTHER": "risotto_resnet20_bn.cifar10-jpeg"}
    names = rf"\b({'|'.join(values)})\b"
    words = [re.sub(names, lambda m: str(values[m[1]]), word) for word in shlex.split(line)]
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})
        return
    if words[0] == "risotto-zoo":
        main, words = cli.main, words[1:]
    else:
        assert words[:2] == ["python", "-m"], line
        package, name = words[2].split(".")
        assert package == "training" and name in PROGRAMS, line
        main, words = getattr(training, name).main, words[3:]
        if name == "train":
            words += [word for setting in TINY for word in ("--set", setting)] + ["--device", "cpu"]
    result = command(main, *words)
    assert result.code == 0, f"{line}\n{result.err}"


def test_what_is_left_out_runs_elsewhere():
    every = re.findall(r"^```bash\n(.*?)^```", README, re.S | re.M)
    assert all(any(start in block for block in every) for start in ELSEWHERE)


def test_scripts_of_others_know_the_models(tmp_path):
    """The README's line for any script, on one that does what timm's scripts do with their arguments."""
    (line,) = [line for line in README.splitlines() if "runpy" in line]
    (tmp_path / "onnx_export.py").write_text(
        "import argparse, timm\n"
        "parser = argparse.ArgumentParser()\nparser.add_argument('output')\nparser.add_argument('--model')\n"
        "args = parser.parse_args()\n"
        "print(args.output, timm.create_model(args.model, device='meta').num_features)\n"
    )
    words = [sys.executable, *shlex.split(line)[1:]]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["out.onnx", "2048"]


def test_from_the_first_run_to_the_hub_and_back(home, images, command):
    torch.set_num_threads(1)
    (start,) = [line for line in SECTIONS["Start"].splitlines() if "training.train" in line]
    run(start.replace(".venv/bin/", ""), images, command)
    for section in ("Release and publish", "Load a trained model", "Fine-tune", "Train"):
        for line in commands(SECTIONS[section]):
            run(line, images, command)
        for block in blocks(SECTIONS[section], "python"):
            exec(block, {})
    assert (home / "my-release" / "README.md").is_file()


@pytest.mark.parametrize("section", ["Use the models", "Evaluate and export"])
def test_the_tools(section, home, images, command):
    for line in commands(SECTIONS[section]):
        run(line, images, command)
    for block in blocks(SECTIONS[section], "python"):
        exec(block, {})


@pytest.mark.parametrize("name", list(MANIFEST))
def test_a_card(name, hub, home, images, command):
    """From the Hub, where the model is as `publish` puts it there."""
    torch.set_num_threads(1)
    folder = ROOT / "model_cards" / name
    hub.put(f"risotto-zoo/{name}", {file: (folder / file).read_bytes() for file in training.publish.FILES})
    card = sections((folder / "README.md").read_text(encoding="utf-8"))
    source = load_recipe(str(folder / "recipe.yaml")).data.source
    (home / source).parent.mkdir()
    (home / source).symlink_to(images)
    for section in ("Use", "Fine-tune"):
        for line in commands(card[section]):
            run(line, images, command)
        for block in blocks(card[section], "python"):
            exec(block, {})
    again, evaluation = commands(card["Reproduce"])
    run(again, images, command, FOLDER=folder)
    run(evaluation, images, command)


def test_other_tools(home):
    pytest.importorskip("transformers", reason="transformers is not installed; pip install transformers")
    for block in blocks(SECTIONS["At home in timm and the Hub"], "python"):
        exec(block, {})
