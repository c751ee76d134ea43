"""Image sets: every way a data folder can be wrong has its line, and what is right is read exactly."""

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import time
from multiprocessing import resource_sharer

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from risotto_zoo.errors import UserError
from risotto_zoo.images import UnreadableImage, read_image
from training import data as image_sets
from training import evaluate, train
from training.augment import augmented, draw, generator_of, mixed
from training.data import View, cache_folder, class_names, load_set, open_source
from training.distributed import World
from training.pipelines import Listed, open_dataset, streamed_batches, validation_batches
from training.recipe import Augment

VIEW = View((3, 32, 32), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
CPU = World(0, 1, torch.device("cpu"))


def options(folder, tmp_path, *more):
    sets = ["data.image_size=16", "batch_size=8", "epochs=1", "warmup_epochs=0", "model_args={}", *more]
    words = [word for setting in sets for word in ("--set", setting)]
    return [
        "--recipe",
        "digits",
        *words,
        "--set",
        f"data.source={folder}",
        "--output",
        tmp_path / "run",
        "--device",
        "cpu",
    ]


@pytest.fixture
def folder(photo_folder, tmp_path):
    shutil.copytree(photo_folder, tmp_path / "photos")
    return tmp_path / "photos"


# --- wrong folders, through the command


def empty(folder):
    for path in folder.rglob("*.jpg"):
        path.unlink()


def corrupt_all(folder):
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"not a picture")


def stray(folder, place):
    image, place = next(folder.rglob("*.jpg")), folder / place
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(image, place / "000.jpg")


BROKEN = [
    (lambda folder: shutil.rmtree(folder), "does not exist"),
    (lambda folder: (shutil.rmtree(folder), folder.touch()), "is a file; name the folder"),
    (empty, "holds no images"),
    (lambda folder: shutil.rmtree(folder / "train" / "church"), "one class only (flower)"),
    (lambda folder: shutil.rmtree(folder / "train"), "no sub-folder train"),
    (lambda folder: shutil.rmtree(folder / "val"), "to validate on (training: or set data.holdout"),
    (
        lambda folder: (folder / "val" / "flower").rename(folder / "val" / "tree"),
        "different classes, such as flower, tree",
    ),
    (corrupt_all, "none of the 48 images"),
    (lambda folder: stray(folder, "train"), "train is no class folder, but holds images"),
    (lambda folder: stray(folder, "train/church/.hidden"), ".hidden is a hidden folder, but holds images"),
    (lambda folder: stray(folder, "val/.trash/church"), ".trash/church is a hidden folder, but holds images"),
]


@pytest.mark.parametrize(("damage", "words"), BROKEN)
def test_a_wrong_folder_is_one_line_and_code_2(damage, words, folder, command, tmp_path):
    damage(folder)
    result = command(train.main, *options(folder, tmp_path))
    assert result.code == 2 and words in result.err, result.err
    assert "Traceback" not in result.err and result.err.strip().count("\n") == 0


STREAMED = ["data.pipeline=streaming", "augment={crop_scale: [0.5, 1.0]}"]


@pytest.mark.parametrize("more", [[], STREAMED])
def test_a_validation_set_without_a_readable_image_is_told_before_anything_is_trained(more, folder, command, tmp_path):
    corrupt_all(folder / "val")
    result = command(train.main, *options(folder, tmp_path, *more))
    assert result.code == 2 and "can be read" in result.err and "step" not in result.err, result.err
    assert "Traceback" not in result.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["model_args={num_classes: 5}"], "num_classes is 5, but"),
        (["model=risotto_resnet21"], "unknown model 'risotto_resnet21'; did you mean 'risotto_resnet"),
        (["batch_size=100"], "batch_size 100 is more than the 48 training images"),
        (["init_from=local-dir:/no/where"], "/no/where"),
        (["init_from=https:nowhere"], "source"),
        (["augment.shift=16"], "augment.shift: it must be smaller than the images of 16 px"),
        (["model_args={in_chans: 4}"], "in_chans is 4"),
        (["data.holdout=0.001"], "leaves one part empty"),
        (["data.val_split=test"], "has no sub-folder test; it has train, val"),
        (["data.root=/somewhere"], "is a folder, which has no root"),
        (["data.loader={re_prob: 0.2}"], "loader belongs to the streaming pipeline"),
        ([*STREAMED, "data.stored_size=20"], "stored_size belongs to the resident pipeline"),
        ([*STREAMED, "data.train_split=test"], "has no sub-folder test; it has train, val"),
        (["model=deit_tiny_patch16_224"], "deit_tiny_patch16_224 takes images of 224 px alone; set"),
        (["model_args={drop_rate: 2}"], "drop_rate is 2, not a number from 0 to below 1"),
        (["model_args={drop_path_rate: x}"], "drop_path_rate is 'x', not a number"),
        (["model_args={alpha: small}"], "alpha is 'small', not a finite number"),
        (["model_args={alpah: 0.1}"], "the net has no argument 'alpah'; did you mean 'alpha'?"),
        ([*STREAMED, "data.loader={re_probe: 1}"], "takes no such argument"),
        ([*STREAMED, "data.loader={auto_augment: foo}"], "data.loader"),
        ([*STREAMED, "data.loader={batch_size: 3}"], "data.loader.batch_size: batch_size decides that"),
        ([*STREAMED, "data.loader={mean: [0, 0, 0]}"], "data.loader.mean: the model decides that"),
        ([*STREAMED, "data.loader={collate_fn: x}"], "takes no such argument"),
        (["data.val_split=train"], "training and validation have the same images; set data.holdout"),
        ([*STREAMED, "data.val_split=train"], "training and validation have the same images; set data.holdout"),
        (["optimizer={name: adamw, options: {betas: [0.9]}}"], "optimizer adamw"),
        (["optimizer={name: muon, options: {adjust_lr_fn: orignal}}"], "orignal"),
    ],
)
def test_settings_that_do_not_fit_the_data_or_the_zoo(more, words, folder, command, tmp_path):
    result = command(train.main, *options(folder, tmp_path, *more))
    assert result.code == 2 and words in result.err, result.err
    assert "Traceback" not in result.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(folder, command, tmp_path):
    for main, arguments in ((train.main, options(folder, tmp_path)), (evaluate.main, ["local-dir:nowhere"])):
        result = command(main, *[a for a in arguments if a not in ("--device", "cpu")], "--device", "cuda")
        assert result.code == 2 and "device 'cuda' is not available" in result.err
    assert "not available" in command(train.main, "--device", "quantum").err


def test_output_folders(folder, command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    for more in ([], ["--overwrite"]):
        result = command(train.main, *options(folder, tmp_path), *more)
        assert result.code == 2 and "holds no run" in result.err
    assert (tmp_path / "run" / "thesis.tex").read_text() == "precious"
    (tmp_path / "run" / "thesis.tex").unlink()

    assert command(train.main, *options(folder, tmp_path)).code == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    result = command(train.main, *options(folder, tmp_path))
    assert result.code == 2 and "holds a finished run; pass --overwrite" in result.err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    result = command(train.main, *options("/no/where", tmp_path), "--overwrite")
    assert result.code == 2 and (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert command(train.main, *options(folder, tmp_path, "seed=1"), "--overwrite").code == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before

    (tmp_path / "file").write_text("")
    for place, words in ((tmp_path / "file", "is a file"), ("/proc/run", "cannot be written")):
        result = command(train.main, *options(folder, tmp_path), "--output", place)
        assert result.code == 2 and words in result.err and "Traceback" not in result.err


def test_corrupt_images_are_named_counted_and_left_out(folder, command, tmp_path):
    damaged = sorted((folder / "train" / "church").glob("*.jpg"))[:3]
    damaged[0].write_bytes(b"")
    damaged[1].write_bytes(damaged[1].read_bytes()[:300])
    damaged[2].unlink()
    damaged[2].symlink_to(folder / "nowhere.jpg")
    result = command(train.main, *options(folder, tmp_path))
    assert result.code == 0, result.err
    assert "3 images could not be read" in result.err and all(str(path) in result.err for path in damaged)
    (folder / "val" / "flower" / "000.jpg").write_text("text")
    result = command(evaluate.main, f"local-dir:{tmp_path / 'run'}", "--data", folder, "--device", "cpu")
    assert result.code == 0 and "1 images could not be read" in result.err and "on 15 images" in result.out
    for path in (folder / "val").glob("*/*"):
        path.write_text("text")
    for models in ([f"local-dir:{tmp_path / 'run'}"], [f"local-dir:{tmp_path / 'run'}"] * 2):
        result = command(evaluate.main, *models, "--data", folder, "--device", "cpu")
        assert result.code == 2 and "none of the" in result.err and "Traceback" not in result.err, result


def test_evaluate_refuses_other_class_counts_and_unknown_models(folder, command, tmp_path):
    assert command(train.main, *options(folder, tmp_path)).code == 0
    shutil.copytree(folder / "val" / "church", folder / "val" / "zebra")
    result = command(evaluate.main, f"local-dir:{tmp_path / 'run'}", "--data", folder, "--device", "cpu")
    assert result.code == 2 and "knows 2 classes, but the data has 3" in result.err
    result = command(evaluate.main, "risotto_resnet2", "--data", folder)
    assert result.code == 2 and "did you mean" in result.err
    result = command(evaluate.main, "risotto_resnet44", "--data", folder)
    assert result.code == 2 and "no pretrained weights" in result.err
    result = command(evaluate.main, f"local-dir:{tmp_path / 'run'}", "--data", folder / "val" / "church")
    assert result.code == 2 and "has one class only;" in result.err


def test_a_listing_is_of_names_and_classes_wherever_the_folder_lies(folder, tmp_path):
    listing = lambda place, training=True: open_source(str(place), training).listing()  # noqa: E731
    before = listing(folder)
    assert before != listing(folder, training=False)
    folder = folder.rename(tmp_path / "elsewhere")
    assert listing(folder) == before
    (folder / "train" / "church").rename(folder / "train" / "zebra")  # the same files, in the other order of classes
    assert listing(folder) != before


# --- what is read


def test_a_set_in_memory_is_what_timms_loader_gives(folder):
    images = load_set(str(folder), False, VIEW, progress=False)
    ours = torch.cat([batch for batch, _ in validation_batches(images, VIEW, CPU)])
    loader = create_loader(
        create_dataset("", root=str(folder / "val")), VIEW.input_size, 16, interpolation="bicubic", crop_pct=1.0,
        mean=VIEW.mean, std=VIEW.std, num_workers=0, use_prefetcher=False, persistent_workers=False,
    )  # fmt: skip
    theirs, targets = next(iter(loader))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert torch.equal(images.targets, targets) and images.classes == ["church", "flower"]


def test_the_cache_is_used_and_follows_the_content(folder):
    first = load_set(str(folder), True, VIEW, progress=False)
    (cached,) = cache_folder().iterdir()
    touched = cached.stat().st_mtime_ns
    again = load_set(str(folder), True, VIEW, progress=False)
    assert torch.equal(first.images, again.images) and cached.stat().st_mtime_ns == touched
    # another picture under the same name, size in bytes and time set back, is another source
    one, other = sorted((folder / "train" / "church").glob("*.jpg"))[:2]
    one.write_bytes(other.read_bytes())
    changed = load_set(str(folder), True, VIEW, progress=False)
    assert torch.equal(changed.images[0], first.images[1])
    # a damaged cache is rebuilt
    for path in cache_folder().iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(load_set(str(folder), True, VIEW, progress=False).images, changed.images)
    for path in cache_folder().iterdir():
        path.write_bytes(path.read_bytes()[:-1000] + bytes(1000))  # as a power cut may leave it
    assert torch.equal(load_set(str(folder), True, VIEW, progress=False).images, changed.images)


def test_an_interrupted_cache_file_leaves_nothing(folder, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_set(str(folder), True, VIEW, progress=False)
    assert not list(cache_folder().iterdir())


def test_the_cache_follows_links_and_looks_at_nothing_beside_the_set(folder, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "validation").symlink_to(folder / "val")
    load = {"split": "validation", "root": str(root), "progress": False}
    first = load_set("torch/image_folder", False, VIEW, **load)
    (root / "beside").write_text("not of the set")
    (cached,) = cache_folder().iterdir()
    again = load_set("torch/image_folder", False, VIEW, **load)
    assert torch.equal(again.images, first.images) and list(cache_folder().iterdir()) == [cached]
    one, other = sorted((folder / "val" / "church").glob("*.jpg"))[:2]
    one.write_bytes(other.read_bytes())
    assert torch.equal(load_set("torch/image_folder", False, VIEW, **load).images[0], first.images[1])


def test_loader_processes_share_no_open_file(photo_folder, tmp_path):
    """They would move each other's place in it, and take images for broken ones."""
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        archive.add(photo_folder / "val", "val")
    listed = Listed(open_source(str(tmp_path), False), 3, False)
    listed.check()
    reader = listed.source.dataset.reader
    assert reader.tar_state.tf is None and reader.cache_tarfiles


def test_a_user_without_a_home_has_a_cache_all_the_same(monkeypatch, tmp_path):
    monkeypatch.delenv("RISOTTO_ZOO_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache_folder() == tmp_path / "risotto-zoo"


def test_a_set_too_large_for_memory_names_the_streaming_pipeline(folder, monkeypatch):
    from collections import namedtuple

    memory = namedtuple("memory", "available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(48 * 3 * 32 * 32))
    with pytest.raises(UserError, match=r"stream it: data.pipeline=streaming"):
        load_set(str(folder), True, VIEW, progress=False)


def test_digits_are_the_same_split_for_everyone():
    view = View((1, 8, 8), (0.5,), (0.5,))
    train_set, val_set = load_set("digits", True, view), load_set("digits", False, view)
    assert (len(train_set), len(val_set)) == (1437, 360) and train_set.classes == [str(i) for i in range(10)]
    assert val_set.targets.bincount().min() >= 34 and val_set.images.max() == 255


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "I;16", "1", "LA", "F"])
def test_images_of_every_mode_become_rgb(mode, tmp_path):
    ramp = Image.fromarray(np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8))
    deep = Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)
    shares = Image.fromarray(np.asarray(ramp).astype(np.float32) / 255)
    picture = {"I;16": deep, "F": shares}.get(mode) or ramp.convert(mode)
    suffix = "tif" if mode in ("CMYK", "F") else "png"
    picture.save(tmp_path / f"x.{suffix}")
    read = np.asarray(read_image(tmp_path / f"x.{suffix}"))
    assert read.shape == (64, 64, 3)
    if mode not in ("1", "P"):
        assert np.abs(read.astype(int) - np.asarray(ramp).astype(int)[..., None]).max() <= 1


def test_dark_images_of_16_bits_stay_dark(tmp_path):
    for value in (200, 300):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / "dark.png")
        assert np.asarray(read_image(tmp_path / "dark.png")).max() <= 1


def test_exif_rotation_and_animations(tmp_path):
    tall = Image.new("RGB", (10, 30))
    exif = tall.getexif()
    exif[0x0112] = 6
    tall.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (30, 10)
    frames = [Image.new("P", (8, 8), i) for i in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif").size == (8, 8)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0broken"])
def test_what_is_no_image_is_said_to_be_none(content, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage):
        read_image(tmp_path / "x.jpg")


# --- augmentation


def test_augmentation_is_per_image_and_reproducible():
    data = torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8)
    settings = Augment(flip=True, shift=3, cutout=4)
    index, ones = torch.arange(20), torch.ones(3)
    first = augmented(data, index, 16, settings, draw(20, settings, generator_of(0, 1)), 0 * ones, ones)
    again = augmented(data, index, 16, settings, draw(20, settings, generator_of(0, 1)), 0 * ones, ones)
    other = augmented(data, index, 16, settings, draw(20, settings, generator_of(0, 2)), 0 * ones, ones)
    assert torch.equal(first, again) and not torch.equal(first, other)
    same_image = augmented(data, index * 0, 16, settings, draw(20, settings, generator_of(0, 3)), 0 * ones, ones)
    assert len(torch.unique(same_image.flatten(1), dim=0)) > 15


def test_flip_and_shift_are_what_they_are_called():
    data = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6)
    settings = Augment(flip=True, shift=2)
    numbers = draw(1, settings, generator_of(0))
    zero, one = torch.zeros(1), torch.ones(1)
    numbers.flip[:], numbers.shift[:] = 0.0, torch.tensor([0.99, 0.4])  # flipped, two down, not sideways
    out = (augmented(data, torch.tensor([0]), 6, settings, numbers, zero, one)[0, 0] * 255).round()
    padded = torch.nn.functional.pad(data.float(), (2, 2, 2, 2), mode="reflect")[0, 0]
    assert torch.equal(out, padded[4:10, 2:8].flip(1))


def test_an_uncropped_resized_crop_is_the_image():
    data = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    settings = Augment(flip=False, crop_scale=(1.0, 1.0))
    numbers = draw(4, settings, generator_of(0))
    numbers.crop[:, 1] = 0.5  # square
    out = augmented(data, torch.arange(4), 16, settings, numbers, torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(out * 255, data.float(), atol=1e-2, rtol=0)


def test_a_quarter_crop_is_that_quarter_of_the_image():
    down = torch.arange(16.0).repeat_interleave(16).reshape(1, 1, 16, 16)  # pixels hold their row
    settings = Augment(flip=False, crop_scale=(0.25, 0.25))
    numbers = draw(1, settings, generator_of(0))
    numbers.crop[:] = torch.tensor([0.3, 0.5, 1.0, 0.0])  # the area is fixed; square, at the bottom, at the left
    for data, first in ((down, 8), (down.mT, 0)):
        out = augmented(data.byte(), torch.tensor([0]), 8, settings, numbers, torch.zeros(1), torch.ones(1))[0, 0] * 255
        expected = torch.arange(first, first + 8.0)
        torch.testing.assert_close(out.mT[0] if first == 8 else out[0], expected, atol=1e-2, rtol=0)


def test_crops_keep_to_their_areas_and_aspect_ratios():
    data = torch.arange(256).byte().repeat(256, 1).reshape(1, 1, 256, 256)  # pixels hold their column
    settings = Augment(flip=False, crop_scale=(0.2, 0.5))
    numbers = draw(200, settings, generator_of(0))
    index = torch.zeros(200, dtype=torch.long)

    def extent(images: torch.Tensor) -> torch.Tensor:
        wide = augmented(images, index, 64, settings, numbers, torch.zeros(1), torch.ones(1))[:, 0] * 255 / 256
        rows = wide if images is data else wide.mT
        return (rows[:, :, -1] - rows[:, :, 0]).mean(dim=1) * 64 / 63

    width, height = extent(data), extent(data.mT)
    area, ratio = width * height, width / height
    assert 0.2 - 1e-2 < area.min() < 0.22 and 0.48 < area.max() < 0.5 + 1e-2
    assert 3 / 4 - 1e-2 < ratio.min() < 0.77 and 1.3 < ratio.max() < 4 / 3 + 2e-2


def test_cutout_hides_a_square_of_its_side():
    data = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    settings = Augment(flip=False, cutout=4)
    numbers = draw(1, settings, generator_of(0))
    for centre, rows, cols in (((0.5, 0.25), slice(6, 10), slice(2, 6)), ((0.0, 1.0), slice(0, 2), slice(14, 16))):
        numbers.cutout[:] = torch.tensor(centre)
        out = augmented(data, torch.tensor([0]), 16, settings, numbers, torch.full((3,), 0.5), torch.ones(3))
        expected = torch.full((3, 16, 16), 0.5)
        expected[:, rows, cols] = 0.0  # the mean colour
        assert torch.equal(out[0], expected)


def test_mixup_and_cutmix_shares():
    settings = Augment(mixup=1.0, cutmix=1.0)
    numbers = draw(400, settings, generator_of(0))
    black, white = torch.zeros(400, 1, 16, 16), torch.ones(400, 1, 16, 16)
    out, share = mixed(black, white, numbers)
    torch.testing.assert_close(out.mean(dim=(1, 2, 3)), 1 - share, atol=1e-5, rtol=0)
    pasted = numbers.box[:, 0] > 0
    assert 150 < pasted.sum() < 250
    assert set(out[pasted].unique().tolist()) == {0.0, 1.0}
    assert sorted(numbers.partner.tolist()) == list(range(400))


def test_shares_are_of_each_mixing_its_own_beta_distribution():
    numbers = draw(20_000, Augment(mixup=0.2, cutmix=2.0), generator_of(0))
    pasted = numbers.box[:, 0] > 0
    for shares, a in ((numbers.share[~pasted], 0.2), (numbers.share[pasted], 2.0)):
        assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
        assert shares.var().item() == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.04)


def test_mixup_prob_leaves_the_other_images_as_they_are():
    settings = Augment(mixup=1.0, cutmix=1.0, mixup_prob=0.25)
    numbers = draw(400, settings, generator_of(0))
    images, partners = torch.zeros(400, 1, 16, 16), torch.ones(400, 1, 16, 16)
    out, share = mixed(images, partners, numbers)
    mixes = out.flatten(1).any(dim=1)
    assert 70 < mixes.sum() < 130
    assert torch.equal(share[~mixes], torch.ones(int((~mixes).sum())))
    assert 0 < numbers.box[mixes, 0].sum() < mixes.sum(), "of those that are mixed some are pasted, some blended"
    torch.testing.assert_close(out.mean(dim=(1, 2, 3)), 1 - share, atol=1e-5, rtol=0)


@pytest.mark.data
def test_cifar_statistics_are_those_in_the_table():
    from conftest import CIFAR

    images = load_set(str(CIFAR), True, View((3, 32, 32), (0.5,) * 3, (0.5,) * 3), progress=False)
    cfg = timm.get_pretrained_cfg("risotto_resnet20")
    channels = images.images.float().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(channels.mean(1), torch.tensor(cfg.mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(channels.std(1), torch.tensor(cfg.std), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pipeline", ["resident", "streaming"])
@pytest.mark.parametrize("kind", ["tar", "torch/image_folder"])
def test_tar_files_and_timm_data_sets_are_the_same_images(kind, pipeline, folder, command, tmp_path):
    settings = [f"data.pipeline={pipeline}", "data.workers=0", "augment={flip: true, crop_scale: [0.5, 1.0]}"]
    if kind == "tar":
        for split in ("train", "val"):
            shutil.make_archive(str(folder / split), "tar", folder / split)
            shutil.rmtree(folder / split)
        arguments = options(folder, tmp_path, *settings)
    else:
        (folder / "val").rename(folder / "validation")
        arguments = options(folder, tmp_path, *settings, f"data.root={folder}")
        arguments += ["--set", "data.source=torch/image_folder"]
    result = command(train.main, *arguments)
    assert result.code == 0, result.err
    assert "48 training and 16 validation images of 2 classes" in result.err
    assert '"church"' in (tmp_path / "run" / "config.json").read_text()


def seen(source, root=None, channels=3):
    """What both pipelines make of a validation set, streamed and held in memory, and what each says it left out."""
    view = View((channels, 32, 32), (0.5,) * channels, (0.25,) * channels)
    held = load_set(source, False, view, root=root, progress=False)
    dataset, _, _ = open_dataset(source, False, None, root, channels)
    streamed = list(streamed_batches(dataset, view, CPU.device, 0, len(held.classes), 8))
    return held, *map(torch.cat, zip(*streamed, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_processes_decode_what_one_does(folder, monkeypatch):
    broken = sorted((folder / "train").rglob("*.jpg"))[5]
    broken.write_bytes(broken.read_bytes()[:100])
    state = torch.get_rng_state()
    alone = load_set(str(folder), True, VIEW)
    shutil.rmtree(cache_folder())
    monkeypatch.setattr(image_sets, "IMAGES_PER_WORKER", 4)
    monkeypatch.setattr(image_sets, "cores", lambda: 3)
    together = load_set(str(folder), True, VIEW)
    assert torch.equal(alone.images, together.images) and torch.equal(alone.targets, together.targets)
    assert alone.unreadable == together.unreadable and str(broken) in alone.unreadable[0]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_a_decoding_process_that_is_killed_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(image_sets, "IMAGES_PER_WORKER", 4)
    monkeypatch.setattr(image_sets, "cores", lambda: 2)
    monkeypatch.setattr(image_sets, "ignore_signals", lambda worker: worker or os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"decoding .*(killed|unexpectedly).*stream it"):
        load_set(str(folder), True, VIEW)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_a_loader_process_whose_parent_hangs_up_says_nothing(capfd):
    """A run that ends in one clear line may end while such a process hands it a batch."""

    def worker(sender):
        image_sets.ignore_signals(0)
        handle = resource_sharer.DupFd(0)
        with socket.socket(socket.AF_UNIX) as parent:
            parent.connect(handle._id[0])
        sender.send(handle._id[0])
        time.sleep(0.5)

    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe()
    process = fork.Process(target=worker, args=(sender,))
    process.start()
    assert receiver.recv()  # it did listen
    process.join()
    assert process.exitcode == 0 and capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["folder", "tar", "torch/image_folder"])
def test_a_broken_image_is_left_out_and_named_wherever_it_lies(kind, folder, tmp_path, capsys):
    broken = sorted((folder / "val").rglob("*.jpg"))[3]
    broken.write_bytes(broken.read_bytes()[:300])
    whole = load_set(str(folder), False, VIEW, progress=False)
    assert len(whole) == 15 and str(broken) in whole.unreadable[0]
    source, root = str(folder), None
    if kind == "tar":
        shutil.make_archive(str(folder / "val"), "tar", folder / "val")
        shutil.rmtree(folder / "val")
    elif kind == "torch/image_folder":
        (folder / "val").rename(folder / "validation")
        source, root = kind, str(folder)
    held, images, targets = seen(source, root)
    assert torch.equal(held.images, whole.images) and torch.equal(held.targets, whole.targets)
    assert len(held.unreadable) == 1 and ("image 3" in held.unreadable[0] or str(broken) in held.unreadable[0])
    torch.testing.assert_close(images, (held.images / 255 - 0.5) / 0.25, atol=1e-5, rtol=0)
    assert torch.equal(targets, whole.targets)
    told = capsys.readouterr().err
    assert held.unreadable[0] in told and "1 images could not be read and are left out" in told


def test_a_tar_file_holds_the_images_that_its_folder_holds(folder):
    """Upright and in eight bits, too."""
    path = sorted((folder / "val").rglob("*.jpg"))[0]
    image, exif = Image.open(path), Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    deep = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60
    Image.fromarray(deep).save(path.with_suffix(".png"))
    as_folder = load_set(str(folder), False, VIEW, progress=False)
    shutil.make_archive(str(folder / "val"), "tar", folder / "val")
    shutil.rmtree(folder / "val")
    as_tar = load_set(str(folder), False, VIEW, progress=False)
    assert len(as_tar) == 17 and not as_tar.unreadable
    assert torch.equal(as_folder.images, as_tar.images) and torch.equal(as_folder.targets, as_tar.targets)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_sets_of_torchvision_become_what_the_net_takes(channels, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = torch.randint(256, (12, 28, 28), generator=torch.Generator().manual_seed(0)).byte().numpy()
    labels = np.arange(12, dtype=np.uint8) % 10
    for name, array in (("images-idx3", digits), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
        (raw / f"t10k-{name}-ubyte").write_bytes(head + array.tobytes())
        (raw / f"train-{name}-ubyte").write_bytes(head + array.tobytes())
    held, images, targets = seen("torch/mnist", str(tmp_path), channels)
    assert held.images.shape == (12, channels, 32, 32) and held.classes[3] == "3 - three"
    torch.testing.assert_close(images, (held.images / 255 - 0.5) / 0.25, atol=1e-5, rtol=0)
    assert targets.tolist() == labels.tolist()


def test_classes_with_several_names_are_told_by_all_of_them():
    """As torchvision's ImageNet has them."""
    dataset = type("ImageNet", (), {"classes": [("tench", "Tinca tinca"), ("goldfish",)]})()
    assert class_names(dataset) == ["tench, Tinca tinca", "goldfish"]
