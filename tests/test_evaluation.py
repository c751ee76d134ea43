"""The numbers of an evaluation, against independent computations of the same."""

import itertools
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, recall_score, top_k_accuracy_score

from risotto_zoo import isometry
from risotto_zoo.checkpoints import model_config, save_model
from risotto_zoo.errors import UserError
from risotto_zoo.evaluation import (
    Outcomes,
    calibration,
    channel_activity,
    compare,
    confusion,
    evaluate,
    observe,
    per_class,
    summarize,
    wilson_interval,
)
from training import evaluate as command_line
from training.corruptions import CORRUPTIONS, STRENGTHS


class Table(torch.nn.Module):
    """A model whose logits are given: image i holds its number."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, images):
        return self.logits[images[:, 0, 0, 0].long()]


def made(count=1000, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(99))
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), targets] += 1.0
    images = torch.arange(count).float().view(-1, 1, 1, 1)
    batches = [(images[i : i + 64], targets[i : i + 64]) for i in range(0, count, 64)]
    return Table(logits), batches, logits, targets


def test_everything_agrees_with_scikit_learn():
    model, batches, logits, targets = made()
    outcomes = observe(model, batches)
    result = summarize(outcomes)
    shares = logits.softmax(1).numpy().astype(np.float64)
    predicted = logits.argmax(1).numpy()
    assert result.top1 == accuracy_score(targets, predicted)
    assert result.top5 == top_k_accuracy_score(targets, shares, k=5)
    assert result.loss == pytest.approx(log_loss(targets, shares), rel=1e-6)
    assert np.array_equal(confusion(outcomes).numpy(), confusion_matrix(targets, predicted))
    recalls = recall_score(targets, predicted, average=None)
    assert [share for _, share in per_class(outcomes)] == pytest.approx(list(recalls))
    assert evaluate(model, batches).top1 == result.top1
    assert 0 < outcomes.seconds < 60


def test_calibration_agrees_with_a_plain_loop():
    model, batches, logits, targets = made()
    result = calibration(observe(model, batches), bins=10)
    confidence, predicted = (value.numpy() for value in logits.softmax(1).max(1))
    expected = 0.0
    for i in range(10):
        inside = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        assert result.counts[i] == inside.sum()
        if inside.any():
            accuracy = (predicted == targets.numpy())[inside].mean()
            expected += inside.sum() / 1000 * abs(confidence[inside].astype(np.float64).mean() - accuracy)
            assert result.accuracy[i] == pytest.approx(accuracy)
    assert result.error == pytest.approx(expected, rel=1e-6)
    sure = Table(torch.eye(3) * 100)
    right = [(torch.arange(3).float().view(-1, 1, 1, 1), torch.arange(3))]
    assert calibration(observe(sure, right)).error == pytest.approx(0, abs=1e-6)


def test_comparison_agrees_with_scipy_and_with_resampling_images():
    from scipy.stats import binomtest

    first, batches, *_ = made(seed=0)
    second, *_ = made(seed=1)
    a, b = observe(first, batches), observe(second, batches)
    result = compare(a, b)
    assert result.difference == pytest.approx(summarize(a).top1 - summarize(b).top1)
    split = binomtest(result.only_first, result.only_first + result.only_second, 0.5)
    assert result.p == pytest.approx(split.pvalue, rel=1e-9)
    draw = np.random.default_rng(0)
    gains = a.correct.numpy().astype(float) - b.correct.numpy()
    means = [gains[draw.integers(0, 1000, 1000)].mean() for _ in range(4000)]
    assert result.interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.004)
    same = compare(a, a)
    assert (same.difference, same.interval, same.p) == (0, (0, 0), 1)
    with pytest.raises(ValueError, match="same images"):
        compare(
            a,
            Outcomes(
                a.targets[:5], *[getattr(a, k)[:5] for k in ("predicted", "confidence", "in_five", "losses")], 7, 1.0
            ),
        )


@pytest.mark.parametrize("correct, total", [(0, 1), (0, 30), (1, 2), (9, 10), (30, 30), (8922, 10000)])
def test_intervals_of_accuracies_are_wilsons(correct, total):
    from scipy.stats import binomtest

    expected = binomtest(correct, total).proportion_ci(method="wilson")
    assert wilson_interval(correct, total) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("a, b", [(0, 1), (0, 9), (3, 12), (70, 40), (513, 470)])
def test_mcnemars_p_is_exact(a, b):
    from scipy.stats import binomtest

    right = torch.arange(1000)  # classes of their own, so that a wrong prediction is any other number
    first, second = right.clone(), right.clone()
    second[:a] += 1
    first[a : a + b] += 1
    made = [Outcomes(right, predicted, *[torch.ones(1000)] * 3, 1001, 1.0) for predicted in (first, second)]
    result = compare(*made)
    assert (result.only_first, result.only_second) == (a, b)
    assert result.p == pytest.approx(binomtest(a, a + b, 0.5).pvalue, rel=1e-9)


def test_edges():
    assert wilson_interval(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="no images"):
        summarize(observe(Table(torch.zeros(1, 3)), []))
    nothing = observe(Table(torch.zeros(1, 3)), [])
    for question in (calibration, lambda outcomes: compare(outcomes, outcomes)):
        with pytest.raises(ValueError, match="no images"):
            question(nothing)
    model, batches, *_ = made(count=3, classes=2)
    outcomes = observe(model, batches)
    assert outcomes.in_five.all() and summarize(outcomes).top5 == 1
    shares = per_class(
        Outcomes(*[torch.zeros(1, dtype=torch.long)] * 2, torch.ones(1), torch.ones(1).bool(), torch.ones(1), 2, 1.0)
    )
    assert shares[0] == (1, 1.0) and shares[1][0] == 0 and math.isnan(shares[1][1])


def test_another_default_device_changes_nothing():
    model, batches, *_ = made()
    outcomes = observe(model, batches)
    net = timm.create_model("risotto_resnet20", seed=0).eval()
    images = torch.randn(2, 3, 8, 8)
    numbers = lambda: repr(  # nan is not nan  # noqa: E731
        [
            summarize(outcomes),
            calibration(outcomes),
            compare(outcomes, outcomes),
            isometry.singular_values(isometry.signal_map(net), images[0]).tolist(),
            isometry.probed_singular_values(isometry.signal_map(net), images[0], 4).tolist(),
            isometry.signal_by_block(net, images),
        ]
    )
    plain = numbers()
    with torch.device("meta"):
        assert numbers() == plain


def test_the_models_modes_and_the_precision_are_put_back():
    model, batches, *_ = made()
    net = torch.nn.Sequential(model, torch.nn.BatchNorm1d(model(batches[0][0]).shape[1])).train()
    net[1].eval()  # frozen
    for precision in ("medium", "highest"):
        torch.set_float32_matmul_precision(precision)
        observe(net, batches)
        assert torch.get_float32_matmul_precision() == precision
    assert net.training and net[0].training and not net[1].training
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch's newer interface
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        observe(net, batches)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def test_top1_of_1000_real_images_is_that_of_a_loop_over_timms_loader(tmp_path, command):
    """scikit-learn's scans as PNG files, through `training.evaluate` and through nothing of ours but the model."""
    digits = load_digits()
    for i in range(1000):
        folder = tmp_path / "digits" / "val" / str(digits.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        scan = Image.fromarray((digits.images[i] * 15).astype(np.uint8)).resize((20, 20))
        scan.convert("RGB").save(folder / f"{i}.png")
    model = timm.create_model("risotto_resnet20", seed=0).eval()
    cfg = model.pretrained_cfg
    data = {key: cfg[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    save_model(tmp_path / "model", model.state_dict(), model_config(model, [str(i) for i in range(10)], data, {}))
    source, report = f"local-dir:{tmp_path / 'model'}", tmp_path / "report.json"
    result = command(command_line.main, source, "--data", tmp_path / "digits", "--device", "cpu", "--json", report)
    assert result.code == 0, result

    model = timm.create_model(source, pretrained=True).eval()
    settings = timm.data.resolve_data_config(model=model)
    loader = timm.data.create_loader(
        timm.data.ImageDataset(str(tmp_path / "digits" / "val")), batch_size=64, use_prefetcher=False, **settings
    )
    correct, loss, count = 0, 0.0, 0
    with torch.no_grad():
        for images, targets in loader:
            logits = model(images)
            correct += (logits.argmax(1) == targets).sum().item()
            loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            count += len(targets)
    ours = json.loads(report.read_text())[0]
    assert count == ours["images"] == 1000
    assert ours["top1"] == correct / count
    assert ours["loss"] == pytest.approx(loss / count, rel=1e-5)


def model_folder(path, classes, seed=0):
    model = timm.create_model("risotto_resnet20", num_classes=len(classes), seed=seed).eval()
    cfg = model.pretrained_cfg
    data = {key: cfg[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    save_model(path, model.state_dict(), model_config(model, classes, data, {}))
    return model


def test_classes_are_matched_by_name(tmp_path, photo_folder, command):
    """A model whose logits stand in another order than the folders is scored as its turned twin is."""
    for name, classes in (("sorted", ["church", "flower"]), ("turned", ["flower", "church"])):
        model = model_folder(tmp_path / name, classes)
        if name == "turned":
            state = {
                key: value.flip(0) if key.startswith("fc.") else value for key, value in model.state_dict().items()
            }
            save_model(tmp_path / name, state, json.loads((tmp_path / name / "config.json").read_text()))
    models = [f"local-dir:{tmp_path / name}" for name in ("sorted", "turned")]
    report = tmp_path / "report.json"
    result = command(command_line.main, *models, "--data", photo_folder, "--json", report, "--device", "cpu")
    assert result.code == 0 and "note:" not in result.err, result
    first, second, comparison = json.loads(report.read_text())
    assert first["top1"] == second["top1"] and first["per_class"] == second["per_class"]
    assert comparison["only_first"] == comparison["only_second"] == 0
    model_folder(tmp_path / "other", ["cat", "dog"])
    result = command(command_line.main, f"local-dir:{tmp_path / 'other'}", "--data", photo_folder, "--device", "cpu")
    assert result.code == 0 and "matched by position" in result.err


def test_dead_channels_are_counted_by_layer(tmp_path, photo_folder, command):
    model = model_folder(tmp_path / "model", ["church", "flower"])
    with torch.no_grad():
        model.layer1[1].conv1.bias[:] = -1e4  # a whole branch
        model.layer2[0].conv1.bias[3] = -1e4
    save_model(tmp_path / "model", model.state_dict(), json.loads((tmp_path / "model" / "config.json").read_text()))
    source, report = f"local-dir:{tmp_path / 'model'}", tmp_path / "report.json"
    arguments = (source, "--data", photo_folder, "--device", "cpu", "--dead")
    result = command(command_line.main, *arguments, "--json", report)
    assert result.code == 0, result.err
    dead = json.loads(report.read_text())[0]["dead_channels"]
    assert dead.pop("layer1.1.act1") == [16, 16] and dead.pop("layer2.0.act1") == [1, 32]
    assert len(dead) == 17 and all(count == 0 for count, _ in dead.values())  # 19 layers with a ReLU
    assert "dead      17 of 688 ReLU channels: layer1.1.act1 16 of 16, layer2.0.act1 1 of 32" in result.out
    assert not any(module._forward_hooks for module in model.modules())
    assert command(command_line.main, *arguments, "--compile").code == 2
    with pytest.raises(UserError, match=r"model\.onnx is an exported file"):
        command_line._watched("model.onnx", lambda images: images)


def test_a_relu_that_a_pass_calls_again_is_a_layer_of_its_own():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.act = torch.nn.ReLU()

        def forward(self, x):
            return self.act(-self.act(x)[:, :1] - 1)

    net, x = Net(), torch.ones(2, 3, 4, 4)
    x[0, 1] = -1
    with channel_activity(net) as activity:
        net(x)
        net(x)
    assert {layer: shares.tolist() for layer, shares in activity.items()} == {"act": [1.0, 0.5, 1.0], "act#2": [0.0]}
    assert not net._forward_pre_hooks and not net.act._forward_hooks


def test_runs_on_different_data_are_not_compared(tmp_path, photo_folder, command):
    """Without --data each run is scored on its own validation images, and those of two runs must be the same."""
    (tmp_path / "half").mkdir()
    for label in ("church", "flower"):
        for split, count in (("train", 24), ("val", 3)):
            folder = tmp_path / "half" / split / label
            folder.mkdir(parents=True)
            for path in sorted((photo_folder / split / label).iterdir())[:count]:
                (folder / path.name).write_bytes(path.read_bytes())
    for name, source in (("a", photo_folder), ("b", tmp_path / "half")):
        model_folder(tmp_path / name, ["church", "flower"])
        (tmp_path / name / "recipe.yaml").write_text(f"data: {{source: {source}}}\n")
    models = [f"local-dir:{tmp_path / name}" for name in "ab"]
    result = command(command_line.main, *models, "--device", "cpu")
    assert result.code == 2 and "saw different images" in result.err and "Traceback" not in result.err
    assert not result.out  # before any of them is evaluated
    file = tmp_path / "a" / "config.json"
    for option, place, words in (
        ("--json", tmp_path, "is a folder"),
        ("--json", file / "x", "cannot be written"),
        ("--figures", file, "cannot be written"),
    ):
        result = command(command_line.main, *models, "--device", "cpu", "--data", photo_folder, option, place)
        assert result.code == 2 and words in result.err and not result.out


def test_classes_of_any_name_are_shown_and_one_that_is_missing_is_named(tmp_path, photo_folder, command):
    data, odd = tmp_path / "data", os.fsdecode(b"fl\xe4che")
    shutil.copytree(photo_folder, data)
    for path in data.glob("*/flower"):
        path.rename(path.with_name(odd))
    model_folder(tmp_path / "two", ["church", "flower"])
    sys.stdout.reconfigure(errors="strict")  # as a terminal's is in most locales
    result = command(
        command_line.main, f"local-dir:{tmp_path / 'two'}", "--data", data, "--figures", tmp_path / "figures"
    )
    assert result.code == 0 and r"fl\udce4che" in result.out and len(list((tmp_path / "figures").iterdir())) == 2
    model_folder(tmp_path / "three", ["bridge", "church", "flower"])
    result = command(command_line.main, f"local-dir:{tmp_path / 'three'}", "--data", photo_folder)
    assert result.code == 2 and "one of them alone has bridge" in result.err


def test_runs_on_other_images_are_not_compared_though_their_labels_agree(photo_folder, command, tmp_path):
    shutil.copytree(photo_folder, tmp_path / "other")
    for name, source in (("a", photo_folder), ("b", tmp_path / "other")):
        model_folder(tmp_path / name, ["church", "flower"])
        (tmp_path / name / "recipe.yaml").write_text(f"data: {{source: {source}}}\n")
    models = [f"local-dir:{tmp_path / name}" for name in "ab"]
    result = command(command_line.main, *models, "--device", "cpu")
    assert result.code == 2 and "saw different images" in result.err
    assert "McNemar" in command(command_line.main, *models, "--device", "cpu", "--data", photo_folder).out


def test_a_split_is_a_sub_folder_and_one_that_is_not_there_is_told(photo_folder, command, tmp_path):
    model_folder(tmp_path / "a", ["church", "flower"])
    base = [f"local-dir:{tmp_path / 'a'}", "--device", "cpu", "--data", photo_folder]
    for more in ((), ("--robustness",)):  # streamed, and held in memory
        assert "on 48 images" in command(command_line.main, *base, "--split", "train", *more).out
        result = command(command_line.main, *base, "--split", "test", *more)
        assert result.code == 2 and "has no sub-folder test; it has train, val" in result.err
        result = command(command_line.main, *base, "--root", tmp_path, *more)
        assert result.code == 2 and "is a folder, which has no root" in result.err
    (tmp_path / "a" / "recipe.yaml").write_text(f"data: {{source: {photo_folder}, holdout: 0.5}}\n")
    assert "on 24 images" in command(command_line.main, *base[:3]).out
    assert "on 16 images" in command(command_line.main, *base[:3], "--split", "val").out


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("side", [16, 32, 224])
def test_every_corruption_harms_more_the_stronger_it_is(kind, side):
    photo = load_sample_images().images[0][:224, :224]
    images = torch.from_numpy(np.array(Image.fromarray(photo).resize((side, side)))).permute(2, 0, 1)[None]
    harm = []
    for strength in range(STRENGTHS):
        damaged = CORRUPTIONS[kind](images, strength, torch.Generator().manual_seed(0))
        assert damaged.dtype == torch.uint8 and damaged.shape == images.shape
        harm.append((damaged.float() - images.float()).square().mean().item())
    assert harm[0] > 0 and all(a < b for a, b in itertools.pairwise(harm))
