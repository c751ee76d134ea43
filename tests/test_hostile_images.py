"""Two hundred odd files through evaluate, predict and the training loaders: each is used or named, none ends a run."""

import struct
import zlib

import numpy as np
import pytest
import timm
from PIL import Image

from risotto_zoo.checkpoints import model_config, save_model
from risotto_zoo.cli import main as cli
from training import evaluate, train

GOOD_KINDS = 8
BAD_KINDS = 10


def picture(draw, mode="RGB", size=(40, 30)):
    shape = (size[1], size[0], {"RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1))
    data = draw.integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(data.squeeze(2) if shape[2] == 1 else data, mode="L" if shape[2] == 1 else mode)


def bomb(width, height):
    """The header of a PNG that says it has more pixels than anyone should decode."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def write_good(folder, i, draw):
    kind = i % GOOD_KINDS
    if kind == 0:
        picture(draw, size=(1, 1)).save(folder / f"dot{i}.png")
    elif kind == 1:
        picture(draw, size=(3_000, 3)).save(folder / f"line{i}.png")
    elif kind == 2:
        picture(draw, "CMYK").save(folder / f"print{i}.jpg")
    elif kind == 3:
        deep = draw.integers(0, 2**16, (30, 40), dtype=np.uint16)
        Image.fromarray(deep).save(folder / f"deep{i}.png")
    elif kind == 4:
        frames = [picture(draw) for _ in range(3)]
        frames[0].save(folder / f"moving{i}.gif", save_all=True, append_images=frames[1:])
    elif kind == 5:
        palette = picture(draw).convert("P")
        palette.info["transparency"] = 3
        palette.save(folder / f"palette{i}.png", transparency=3)
    elif kind == 6:
        turned = picture(draw)
        exif = turned.getexif()
        exif[0x0112] = 6
        turned.save(folder / f"turned{i}.jpg", exif=exif)
    else:
        picture(draw, "L").save(folder / f"グレー ünïcode {'long' * 40} {i}.jpg")


def write_bad(folder, i, draw):
    kind = i % BAD_KINDS
    path = folder / f"bad{i}.jpg"
    if kind == 0:
        path.write_bytes(b"")
    elif kind == 1:
        picture(draw, size=(200, 200)).save(path)
        path.write_bytes(path.read_bytes()[:300])
    elif kind == 2:
        path.write_text("this is a text file called .jpg")
    elif kind == 3:
        path.symlink_to(folder / "nowhere.jpg")
    elif kind == 4:
        (folder / f"bad{i}.png").write_bytes(bomb(60_000, 60_000))
    elif kind == 5:
        path.write_bytes(draw.bytes(2000))
    elif kind == 6:
        (folder / f"bad{i}.png").write_bytes(bomb(10, 10) + b"\0\0\0")
    elif kind == 7:
        picture(draw, size=(2, 2_001)).save(folder / f"bad{i}.png")
    elif kind == 8:
        Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)).save(path, "TIFF")
    else:
        path.write_bytes(b"\xff\xd8\xff\xe0" + draw.bytes(40))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """train and val, two classes: 100 readable and 100 unreadable files, and what the model needs."""
    root, draw = tmp_path_factory.mktemp("odd"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(25):
                write_good(folder, i, draw)
                write_bad(folder, i, draw)
    model = timm.create_model("risotto_resnet20", num_classes=2, seed=0)
    cfg = model.pretrained_cfg
    data = {key: cfg[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    save_model(root / "model", model.state_dict(), model_config(model, ["a", "b"], data, {}))
    return root


def bad_names(folder):
    return {path.name for path in folder.rglob("bad*")}


def moving_names(folder):
    return {path.name for path in folder.rglob("moving*")}


@pytest.mark.parametrize("streamed", [False, True])  # two models are compared on images held in memory
def test_evaluate_uses_the_good_ones_and_names_the_others(streamed, odd, command):
    models = [f"local-dir:{odd / 'model'}"] * (1 if streamed else 2)
    result = command(evaluate.main, *models, "--data", odd, "--workers", 0)
    left_out = bad_names(odd / "val") | moving_names(odd / "val")  # timm's folders have no animations
    assert result.code == 0 and "on 44 images" in result.out, result
    counts = ["6 images could not", "50 images could not"] if streamed else ["56 images could not"]
    assert all(count in result.err for count in counts), result.err
    assert all(name in result.err for name in left_out)


def test_predict_uses_the_good_ones_and_names_the_others(odd, command):
    result = command(cli, "predict", odd / "val", "--model", f"local-dir:{odd / 'model'}")
    assert result.code == 0 and result.out.count("\n  ") == 2 * 50, result
    assert "50 of 100 images could not be read" in result.err
    assert all(name in result.err for name in bad_names(odd / "val"))


@pytest.mark.parametrize("pipeline", ["resident", "streaming"])
def test_training_uses_the_good_ones(pipeline, odd, command, tmp_path):
    settings = ["epochs=1", "warmup_epochs=0", "batch_size=10", "augment.shift=0", f"data.pipeline={pipeline}"]
    settings += [f"data.source={odd}", "data.image_size=32", "data.workers=0", "model_args={}"]
    settings += ["augment.crop_scale=[0.5, 1.0]"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    result = command(train.main, "--recipe", "digits", *arguments, "--output", tmp_path / "run", "--device", "cpu")
    assert result.code == 0 and "top-1" in result.err, result
    left_out = bad_names(odd) | moving_names(odd) if pipeline == "resident" else bad_names(odd / "val")
    assert all(name in result.err for name in left_out), result.err
    assert ("112 images" if pipeline == "resident" else "50 images") + " could not be read" in result.err
