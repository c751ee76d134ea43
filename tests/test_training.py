"""Training end to end: what a run leaves, that it is reproducible, and that nothing interrupts it for good."""

import csv
import errno
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import yaml
from forked import Forked

from risotto_zoo.errors import UserError
from risotto_zoo.evaluation import Outcomes, wilson_interval
from risotto_zoo.evaluation import evaluate as evaluate_net
from risotto_zoo.models.variants import own_cfg
from training import engine, evaluate, release, run_folder, train
from training.cuda_graph import WARMUP
from training.data import View
from training.distributed import World
from training.pipelines import build_pipeline
from training.recipe import load_recipe
from training.run_folder import read_metrics

CPU = World(0, 1, torch.device("cpu"))
REPOSITORY = Path(__file__).parent.parent
# A net of 9 blocks on 8-pixel digits: an epoch of 11 steps takes about a second.
TINY = ["--set", "epochs=2", "--set", "data.image_size=8", "--set", "batch_size=128", "--set", "warmup_epochs=0.5"]


def start(*args, program=("-m", "training.train")):
    """The command as its own process group, on one thread of the CPU."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *map(str, program), *map(str, args), "--device", "cpu"]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def with_step(path, line):
    """A program that trains and runs a line before each step."""
    path.write_text(
        "import os, signal, torch\n"
        "from training import engine, train\n"
        "original = engine._step\n"
        "def step(trainer, *args):\n"
        "    at, rank = trainer.progress.step, trainer.world.rank\n"
        f"    {line}\n"
        "    return original(trainer, *args)\n"
        "engine._step = step\n"
        "train.main()\n"
    )
    return (path,)


@contextmanager
def stopping_after_an_epoch(monkeypatch):
    """As if a signal had come at the end of the first epoch, whatever is saved by then."""
    train_epoch = engine._train_epoch

    def stopped(trainer, *args):
        if trainer.progress.history:
            raise engine.Stopped(signal.SIGTERM)
        train_epoch(trainer, *args)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_train_epoch", stopped)
        yield


def here(command, *args):
    """The command in this process: much of what a new one takes goes into its imports."""
    torch.set_num_threads(1)
    return command(train.main, *args, "--device", "cpu")


def weights(folder, kind=None):
    """Those that a run is loaded with, or, of a run with a moving average, the raw or averaged (ema) ones."""
    file = folder / f"model_{kind}.safetensors"
    return safetensors.torch.load_file(file if file.is_file() else folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(autouse=True)
def _default_handlers():
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the digits recipe, shortened to three epochs."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    process = Forked("--recipe", "digits", *TINY, "--set", "epochs=3", "--output", folder, "--device", "cpu")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "load      timm.create_model('local-dir:" in err
    return folder


def test_a_run_folder_is_a_timm_model_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.json", "model.safetensors", "recipe.yaml", "metrics.csv", "results.json", "curves.png", "state"
    } == names  # fmt: skip
    config = json.loads((finished / "config.json").read_text())
    assert config["architecture"] == "risotto_resnet20" and config["label_names"] == [str(i) for i in range(10)]
    model = timm.create_model(f"local-dir:{finished}", pretrained=True)
    again = timm.create_model("risotto_resnet20", in_chans=1)
    again.load_state_dict(weights(finished))
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(model.eval()(x), again.eval()(x))
    assert timm.create_model(f"local-dir:{finished}", pretrained=True, num_classes=3)(x).shape == (4, 3)


def test_the_run_learned_something_and_says_so(finished):
    results = json.loads((finished / "results.json").read_text())
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    assert results["raw"]["top1"] > 0.5
    assert float(rows[-1]["val_top1"]) == results["raw"]["top1"] and len(rows) == 3
    correct = round(results["raw"]["top1"] * 360)
    assert results["raw"]["top1_interval"] == list(wilson_interval(correct, 360))
    digest = hashlib.sha256((finished / "model.safetensors").read_bytes()).hexdigest()
    assert results["sha256"]["model.safetensors"] == digest
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    recipe = load_recipe(str(finished / "recipe.yaml"))
    assert recipe.epochs == 3 and recipe.seed == 0
    assert "# torch" in (finished / "recipe.yaml").read_text()


def test_evaluate_gives_the_numbers_of_the_run(finished, command, tmp_path):
    torch.set_num_threads(1)
    result = command(evaluate.main, f"local-dir:{finished}", "--json", tmp_path / "numbers.json", "--device", "cpu")
    assert result.code == 0, result.err
    (numbers,) = json.loads((tmp_path / "numbers.json").read_text())
    expected = json.loads((finished / "results.json").read_text())["raw"]
    for key in ("images", "top1", "top5", "top1_interval", "top5_interval"):
        assert numbers[key] == expected[key]
    assert numbers["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert f"{100 * expected['top1']:.2f}%" in result.out


def test_the_same_recipe_gives_the_same_weights_in_another_process(finished, command, tmp_path):
    options = ["--recipe", "digits", *TINY, "--set", "epochs=3", "--output", tmp_path / "again"]
    assert here(command, *options).code == 0
    assert same(weights(finished), weights(tmp_path / "again"))


# --- interruptions


def kill_and_resume(folder, options, steps, reference, command):
    """Start, SIGKILL about each of the steps, start again; in the end the weights are those of the reference."""
    for step in steps:
        process = Forked(*options, "--set", "log_every=1", "--output", folder, "--device", "cpu")
        assert any(f"step {step}/" in line for line in process.stderr)
        process.kill()
        process.communicate()
    result = here(command, *options, "--output", folder)
    assert result.code == 0 and "resumed at step" in result.err, result.err
    assert same(weights(folder), weights(reference))
    assert (folder / "metrics.csv").read_text().count("\n") == (reference / "metrics.csv").read_text().count("\n")


OFTEN = ["--recipe", "digits", *TINY, "--set", "epochs=3", "--set", "ema_decay=0.9", "--set", "save_minutes=0.005"]
OFTEN += ["--set", "model_args={in_chans: 1, drop_path_rate: 0.2}"]
EACH_STEP = [*OFTEN, "--set", "save_minutes=1e-9"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    torch.set_num_threads(1)
    engine.train(load_recipe("digits", [word for word in OFTEN[2:] if word != "--set"]), folder, CPU)
    return folder


class Killed(BaseException):
    pass


def test_killed_within_an_epoch_the_run_ends_with_the_same_weights_and_metrics(
    undisturbed, command, tmp_path, monkeypatch
):
    reference = undisturbed
    folder, step = tmp_path / "run", engine._step

    def killed(trainer, *args):
        if trainer.progress.step == 14:
            raise Killed
        return step(trainer, *args)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(engine, "_step", killed)
        here(command, *EACH_STEP, "--output", folder)
    assert engine.load_state(folder / "state")[0] == 14
    assert here(command, *EACH_STEP, "--output", folder).code == 0
    assert same(weights(folder), weights(reference))
    rows = [list(csv.DictReader((place / "metrics.csv").open())) for place in (folder, reference)]
    exact = ("train_loss", "train_top1", "val_loss", "val_top1", "ema_loss", "ema_top1", "lr")
    assert [[row[key] for key in exact] for row in rows[0]] == [[row[key] for key in exact] for row in rows[1]]


def test_killed_at_two_random_moments_the_run_ends_with_the_same_weights(undisturbed, command, tmp_path):
    draw = random.Random(0)
    steps = [draw.randrange(11, 17), draw.randrange(22, 30)]  # of 33; the end of an epoch has saved by then
    kill_and_resume(tmp_path / "killed", OFTEN, steps, undisturbed, command)
    assert all(same(weights(tmp_path / "killed", kind), weights(undisturbed, kind)) for kind in ("raw", "ema"))


@pytest.mark.slow
def test_killed_at_twenty_random_moments_the_run_ends_with_the_same_weights(undisturbed, command, tmp_path):
    draw = random.Random(1)
    for attempt in range(20):
        kill_and_resume(tmp_path / str(attempt), OFTEN, [draw.randrange(12, 32)], undisturbed, command)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_leave_a_readable_folder(number, code, finished, command, tmp_path):
    folder = tmp_path / "run"
    options = ["--recipe", "digits", *TINY, "--set", "epochs=3", "--set", "log_every=1", "--output", folder]
    process = Forked(*options, "--device", "cpu")
    for line in process.stderr:
        if "step 14/" in line:
            process.send_signal(number)
            break
    begin = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err and time.time() - begin < 10
    timm.create_model(f"local-dir:{folder}", pretrained=True)
    resumed = here(command, *options)
    assert resumed.code == 0 and "resumed at step" in resumed.err
    assert same(weights(folder), weights(finished))


def test_damaged_states_are_named_and_skipped(undisturbed, command, tmp_path):
    reference = undisturbed
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    for path in (folder / "results.json", *folder.glob("model*.safetensors")):
        path.unlink()
    newest, older = sorted((folder / "state").glob("*.safetensors"), reverse=True)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    result = here(command, *OFTEN, "--output", folder)
    assert result.code == 0, result.err
    assert f"skipped a state that does not verify: {newest.stem}.json" in result.err
    assert f"resumed at step {int(older.stem[5:])}" in result.err
    assert same(weights(folder), weights(reference))


def test_a_truncated_state_is_skipped_and_none_left_means_from_the_beginning(undisturbed, command, tmp_path):
    reference = undisturbed
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    (folder / "results.json").unlink()
    newest, older = sorted((folder / "state").glob("*.json"), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-20])
    older.write_bytes(older.read_bytes().replace(b'"step": ', b'"step": 1', 1))
    result = here(command, *OFTEN, "--output", folder)
    assert result.code == 0 and result.err.count("skipped a state") == 2 and "starting again" in result.err
    assert same(weights(folder), weights(reference))


def test_new_states_are_kept_although_later_damaged_ones_lie_there(tmp_path):
    from training.state import load_state, save_state

    for step in (100, 200):
        save_state(tmp_path, step, {"x": torch.ones(1)}, {})
        (tmp_path / f"step-{step:09d}.json").write_text("{")
    (tmp_path / "step-000000150.safetensors").write_text("killed between the two files of a state")
    (tmp_path / "backup").mkdir()
    (tmp_path / "notes.txt").write_text("somebody's")
    for step in (10, 20, 30):
        save_state(tmp_path, step, {"x": torch.full((1,), float(step))}, {"note": step})
    step, tensors, facts, skipped = load_state(tmp_path)
    assert (step, tensors["x"].item(), facts, skipped) == (30, 30.0, {"note": 30}, [])
    (tmp_path / "step-000000040.json").write_text("[" * 100_000)
    assert load_state(tmp_path)[0] == 30
    (tmp_path / "step-000000040.json").unlink()
    assert len(list(tmp_path.glob("step-*"))) == 4 and len(list(tmp_path.iterdir())) == 6


def one_image_less(folder):
    (folder / "train" / "church" / "000.jpg").unlink()


def one_to_validate_on_less(folder):
    (folder / "val" / "church" / "000.jpg").unlink()


def other_classes(folder):
    for old, new in (("church", "x"), ("flower", "church"), ("x", "flower")):
        (folder / "train" / old).rename(folder / "train" / new)


def one_under_another_name(folder):
    (folder / "train" / "church" / "000.jpg").rename(folder / "train" / "church" / "zzz.jpg")


STREAMED = ["data.pipeline=streaming", "data.workers=0", "augment={crop_scale: [0.5, 1.0]}"]


@pytest.mark.parametrize(
    ("change", "more"),
    [
        (one_image_less, []),
        (one_to_validate_on_less, []),
        (other_classes, []),
        (one_under_another_name, STREAMED),
    ],
)
def test_a_run_is_not_resumed_on_other_images(change, more, photo_folder, tmp_path, command):
    folder = tmp_path / "photos"
    shutil.copytree(photo_folder, folder)
    settings = ["data.image_size=16", "batch_size=8", "epochs=2", "warmup_epochs=0", f"data.source={folder}", *more]
    options = [word for setting in settings for word in ("--set", setting)]
    arguments = ["--recipe", "digits", *options, "--output", tmp_path / "run", "--device", "cpu"]
    assert command(train.main, *arguments).code == 0
    (tmp_path / "run" / "results.json").unlink()
    change(folder)
    result = command(train.main, *arguments)
    assert result.code == 2 and "have changed since" in result.err


def test_a_net_that_cannot_take_the_images_costs_nothing_that_was_there(tmp_path, command):
    options = ["--recipe", "digits", *TINY, "--output", tmp_path / "run"]
    assert here(command, *options).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for change, words in (
        (["model=vgg11"], "vgg11 makes nothing of images of 8 px ("),
        (["model=vgg11", "data.image_size=32", "data.train_size=16", "augment.crop_scale=[0.5, 1]"], "data.train_size"),
        (["model=resnetv2_18", 'model_args={global_pool: ""}'], "values of shape (1, 10, 1, 1) for 10 classes"),
    ):
        settings = [word for setting in [*change, "optimizer.name=adamw"] for word in ("--set", setting)]
        result = here(command, *options, *settings, "--overwrite")
        assert result.code == 2 and words in result.err and "Traceback" not in result.err, result.err
        assert {path: path.read_bytes() for path in before} == before


def test_only_a_net_of_this_zoo_is_told_to_be_released(tmp_path, command):
    options = ["--set", "model=test_resnet", "--set", "model_args={}", "--output", tmp_path / "run"]
    result = here(command, "--recipe", "digits", *TINY, *options)
    assert result.code == 0 and "evaluate  python" in result.err and "training.release" not in result.err, result.err


def test_names_with_dollar_signs_are_drawn_as_they_are(tmp_path, recwarn):
    row = dict.fromkeys(("epoch", "train_loss", "val_loss", "train_top1", "val_top1"), 1.0)
    run_folder.write_curves(tmp_path, [row], "net on pics $_$ x 猫")
    said = torch.arange(2)
    outcomes = Outcomes(said, said, said.float(), said > 0, said.float(), 2, 1.0)
    assert run_folder.png(evaluate.confusion_matrix(outcomes, ["a$_$b", os.fsdecode(b"c\xe4")]))
    assert (tmp_path / "curves.png").stat().st_size
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


def test_a_run_is_not_resumed_on_images_prepared_otherwise(command, tmp_path, monkeypatch):
    """A net's release may bring another size or another mean with it."""
    options = ["--recipe", "digits", *TINY, "--output", tmp_path / "run"]
    assert here(command, *options).code == 0
    (tmp_path / "run" / "results.json").unlink()
    before = engine._registered_config
    monkeypatch.setattr(engine, "_registered_config", lambda name: {**before(name), "mean": (0.5, 0.5, 0.5)})
    result = here(command, *options)
    assert result.code == 2 and "have changed since" in result.err


@pytest.mark.parametrize("name", ["lamb", "adan", "lion", "adamw", "sgd", "muon"])
def test_every_optimizer_resumes_exactly(name, tmp_path):
    """Two steps, saved and restored into another optimizer, then a third of both: the same parameters."""
    from training.optimization import build_optimizer
    from training.state import flatten_optimizer, restore_optimizer

    def net():
        return timm.create_model("risotto_resnet20", seed=0)

    def step(model, optimizer, seed):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    recipe = load_recipe("digits", [f"optimizer={{name: {name}, lr: 0.001, momentum: 0.9}}"])
    one, other = net(), net()
    first, second = build_optimizer(one, recipe), build_optimizer(other, recipe)
    for seed in (1, 2):
        step(one, first, seed)
    tensors, plain = flatten_optimizer(first)
    other.load_state_dict(one.state_dict())
    restore_optimizer(second, {key: value.clone() for key, value in tensors.items()}, json.loads(json.dumps(plain)))
    step(one, first, 3)
    step(other, second, 3)
    assert same(one.state_dict(), other.state_dict())


def test_a_loss_that_is_not_finite_stops_with_code_3(command, tmp_path):
    options = ["--recipe", "digits", *TINY, "--set", "optimizer.name=sgd", "--set", "optimizer.lr=1e20"]
    result = command(train.main, *options, "--output", tmp_path / "run", "--device", "cpu")
    assert result.code == 3
    assert "not finite at step" in result.err and "learning rate" in result.err and "Usual mends" in result.err
    assert "no state was saved yet" in result.err
    assert "Traceback" not in result.err
    # It has saved nothing that the mended recipe could harm.
    assert command(train.main, *options, "--set", "optimizer.lr=1e-3", "--output", tmp_path / "run").code == 0
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).optimizer.lr == 1e-3


@pytest.mark.parametrize("sign", ["loss", "weights"])
def test_weights_that_are_not_finite_are_never_saved(sign, undisturbed, command, tmp_path, monkeypatch):
    reference = undisturbed
    folder, step = tmp_path / "run", engine._step

    def breaks(trainer, *args):
        loss, correct = step(trainer, *args)
        if trainer.progress.step == 14:
            next(trainer.model.parameters()).data.fill_(torch.nan)
            if sign == "loss":
                loss = loss * torch.nan
        return loss, correct

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_step", breaks)
        result = here(command, *EACH_STEP, "--output", folder)
        assert result.code == 3 and f"the last good state is kept in {folder / 'state'}" in result.err
    found, tensors, *_ = engine.load_state(folder / "state")
    assert found == 14 and all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
    assert here(command, *EACH_STEP, "--output", folder).code == 0
    assert same(weights(folder), weights(reference))


def test_a_signal_saves_nothing_that_is_not_finite(command, tmp_path, monkeypatch):
    step = engine._step

    def breaks(trainer, *args):
        if trainer.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            next(trainer.model.parameters()).data.fill_(torch.nan)
        return step(trainer, *args)

    monkeypatch.setattr(engine, "_step", breaks)
    assert here(command, "--recipe", "digits", *TINY, "--output", tmp_path / "run").code == 3
    assert not (tmp_path / "run" / "state").exists()


def test_a_device_out_of_memory_is_one_line(command, tmp_path, monkeypatch):
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "_step", step)
    result = command(train.main, "--recipe", "digits", *TINY, "--output", tmp_path / "run", "--device", "cpu")
    assert result.code == 2 and "smaller batch_size" in result.err and "Traceback" not in result.err


def test_a_machine_that_cannot_compile_is_told_in_one_line(finished, command, tmp_path, monkeypatch):
    def backend(*_):
        raise RuntimeError("there is no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    options = ["--recipe", "digits", *TINY, "--set", "compile=true", "--output", tmp_path / "run", "--device", "cpu"]
    for main, arguments in ((train.main, options), (evaluate.main, [f"local-dir:{finished}", "--compile"])):
        result = command(main, *arguments)
        assert result.code == 2 and "there is no compiler here" in result.err and "Traceback" not in result.err
        assert result.err.count("error: ") == 1


def test_a_full_disk_keeps_the_previous_state(command, tmp_path, monkeypatch):
    """Writing a state fails half-way through: what was there before is whole, and the run can go on from it."""
    from training import engine, state

    folder = tmp_path / "run"
    writes = 0
    original = state.write_atomically

    def write(path, data):
        nonlocal writes
        writes += path.suffix == ".safetensors"
        if writes == 3 and path.suffix == ".safetensors":
            full = Path("/dev/full")
            with open(full, "wb", buffering=0) as file:
                file.write(data)
        original(path, data)

    monkeypatch.setattr(state, "write_atomically", write)
    options = ["--recipe", "digits", *TINY, "--set", "epochs=3", "--output", folder, "--device", "cpu"]
    result = command(train.main, *options)
    assert result.code == 2 and "No space left" in result.err and "Traceback" not in result.err
    step, *_, skipped = engine.load_state(folder / "state")
    assert step == 22 and skipped == []
    monkeypatch.setattr(state, "write_atomically", original)
    assert command(train.main, *options).code == 0


def test_a_full_disk_loses_nothing_of_the_run_to_be_replaced(finished, command, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    options = ["--recipe", "digits", *TINY, "--output", folder, "--device", "cpu", "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_atomically", full)
        result = command(train.main, *options)
    assert result.code == 2 and "what it held is untouched" in result.err and "Traceback" not in result.err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert command(train.main, *options).code == 0


def test_what_a_run_stopped_before_its_last_row_lacks_is_made_up_for(command, tmp_path, monkeypatch):
    """Killed after the state of the last epoch was saved and before its metrics were."""

    def killed(*_):
        raise Killed

    options = ["--recipe", "digits", *TINY, "--set", "epochs=1", "--output", tmp_path / "run", "--device", "cpu"]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(engine.run_folder, "write_metrics", killed)
        command(train.main, *options)
    recipe = tmp_path / "run" / "recipe.yaml"
    begun = recipe.read_text().replace("# torch ", "# torch 0.")
    recipe.write_text(begun)
    assert command(train.main, *options).code == 0
    assert recipe.read_text() == begun  # with the versions that it was begun with
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [float(row["epoch"]) for row in rows] == [1] and (tmp_path / "run" / "curves.png").is_file()


def test_two_processes_do_not_train_in_one_folder(command, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(engine.run_folder, "PATIENCE", 0.1)
    options = ["--recipe", "digits", *TINY, "--output", tmp_path / "run", "--device", "cpu"]
    with engine.run_folder.locked(tmp_path / "run"):
        result = command(train.main, *options)
    assert result.code == 2 and "another process is training in" in result.err
    assert not list((tmp_path / "run").iterdir())


def test_a_run_that_another_process_begins_meanwhile_is_not_gone_on_with(command, tmp_path, monkeypatch):
    @contextmanager
    def late(folder):
        (folder / "recipe.yaml").write_text("seed: 1\n")
        (folder / "state").mkdir(exist_ok=True)
        (folder / "state" / "step-000000001.json").write_text("{}")
        yield

    monkeypatch.setattr(engine.run_folder, "locked", late)
    result = here(command, "--recipe", "digits", *TINY, "--output", tmp_path / "run")
    assert result.code == 2 and "unfinished run of another recipe" in result.err


# --- options of the engine


@pytest.mark.parametrize(
    "settings",
    [
        ["weight_standardization=true", "clip={mode: agc, value: 0.02}"],
        ["ema_decay=0.95", "accumulate=2", "amp=bfloat16", "channels_last=true"],
        ["optimizer.name=adamw", "optimizer.lr=0.002", "schedule=linear", "label_smoothing=0.1"],
        ["optimizer.name=sgd", "optimizer.lr=0.02", "schedule=constant", "clip={mode: norm, value: 1.0}"],
        ["augment.mixup=0.2", "augment.cutmix=1.0", "augment.cutout=2", "augment.crop_scale=[0.6, 1.0]"],
        ["model_args={in_chans: 1, drop_path_rate: 0.1, init: he}", "tensorboard=true"],
        ["model=risotto_resnet20_bn", "optimizer.other_lr=0.01"],
    ],
)
def test_settings_train_and_give_a_plain_model(settings, command, tmp_path):
    options = [word for setting in settings for word in ("--set", setting)]
    arguments = ["--recipe", "digits", *TINY, *options, "--output", tmp_path / "run", "--device", "cpu"]
    result = command(train.main, *arguments)
    assert result.code == 0, result.err
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert not any("parametrizations" in key for key in model.state_dict())
    history = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert float(history[1]["train_loss"]) < float(history[0]["train_loss"]) < 2.6
    if "tensorboard=true" in settings:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
        assert [scalar.value for scalar in events.Scalars("val_top1")] == pytest.approx(
            [float(row["val_top1"]) for row in history]
        )


def test_a_run_stopped_as_it_validates_tells_the_same_and_leaves_nothing_behind(
    finished, command, tmp_path, monkeypatch
):
    options = ["--recipe", "digits", *TINY, "--set", "epochs=3", "--output", tmp_path / "run"]
    evaluate_all = engine.evaluate

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_all(*args)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "evaluate", stopped)
        assert here(command, *options).code == 143
    leftover = tmp_path / "run" / "model.safetensors.1.tmp"  # as if it had been killed while it wrote
    leftover.touch()
    notes = tmp_path / "run" / "state" / "notes.txt"
    notes.touch()
    (tmp_path / "run" / "results.json").write_text('{"raw": {')
    assert here(command, *options).code == 0 and not leftover.exists()
    timing = {"images_per_second", "data_wait", "seconds"}
    told = [
        [{key: value for key, value in row.items() if key not in timing} for row in read_metrics(folder)]
        for folder in (tmp_path / "run", finished)
    ]
    assert told[0] == told[1]
    assert here(command, *options, "--overwrite").code == 0 and notes.is_file()


def test_what_was_logged_after_the_last_state_is_logged_once(command, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--recipe", "digits", *TINY, "--set", "tensorboard=true", "--set", "save_every=2"]
    options += ["--output", tmp_path / "run"]
    with stopping_after_an_epoch(monkeypatch):
        assert here(command, *options).code == 143
    assert here(command, *options).code == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("val_loss")] == [
        row["step"] for row in read_metrics(tmp_path / "run")
    ]


def test_rare_validation_changes_no_weight_and_leaves_gaps(finished, command, tmp_path):
    more = ["--set", "epochs=3", "--set", "val_every=2", "--set", "tensorboard=true"]
    result = command(train.main, "--recipe", "digits", *TINY, *more, "--output", tmp_path / "run", "--device", "cpu")
    assert result.code == 0, result.err
    assert same(weights(tmp_path / "run"), weights(finished))
    rare, each = read_metrics(tmp_path / "run"), read_metrics(finished)
    assert [row["val_top1"] for row in rare] == [None, each[1]["val_top1"], each[2]["val_top1"]]
    assert [row["train_loss"] for row in rare] == [row["train_loss"] for row in each]
    lines = [line for line in result.err.splitlines() if line.startswith("epoch ")]
    assert ["validation loss" in line for line in lines] == [False, True, True]


@pytest.mark.parametrize("name", ["risotto_resnet20", "risotto_resnet20_c", "risotto_resnet50_cifar"])
def test_weight_standardization_starts_at_the_same_net_and_folds_away(name):
    from training.optimization import folded_state, standardize

    model = timm.create_model(name, seed=0, dtype=torch.float64).eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected, keys = model(x), list(model.state_dict())
    standardize(model)
    torch.testing.assert_close(model(x), expected, atol=1e-9, rtol=1e-9)
    model(x).square().sum().backward()
    gains = [p for key, p in model.named_parameters() if key.endswith("original1")]
    assert len(gains) == sum(1 for key in keys if "conv" in key and key.endswith("weight")) - 1 + sum(
        "downsample" in key and key.endswith("weight") for key in keys
    )
    assert all(gain.grad.abs().sum() > 0 for gain in gains)
    plain = timm.create_model(name, dtype=torch.float64).eval()
    plain.load_state_dict(folded_state(model))
    torch.testing.assert_close(plain(x), expected, atol=1e-9, rtol=1e-9)


def test_fine_tuning_takes_weights_and_a_new_head(finished, command, tmp_path, photo_folder):
    settings = ["data.image_size=16", "batch_size=16", "epochs=1", "warmup_epochs=0", "freeze=2"]
    options = [word for setting in settings for word in ("--set", setting)]
    result = command(
        train.main, "--recipe", "digits", *options, "--set", f"data.source={photo_folder}", "--device", "cpu",
        "--init-from", f"local-dir:{finished}", "--output", tmp_path / "tuned",
    )  # fmt: skip
    assert result.code == 0, result.err
    tuned, start_weights = weights(tmp_path / "tuned"), weights(finished)
    assert tuned["fc.weight"].shape == (2, 64)
    for key, value in start_weights.items():
        frozen = key.startswith(("conv1", "layer1"))
        assert torch.equal(tuned[key], value) == frozen or key.startswith("fc")


def test_arguments_of_a_start_that_weights_replace_are_told_and_not_recorded(finished, command, tmp_path):
    options = [*TINY, "--set", "epochs=1", "--set", "warmup_epochs=0", "--init-from", f"local-dir:{finished}"]
    options += ["--set", "model_args={alpha: 0.3, patches: true}", "--output", tmp_path / "tuned"]
    result = here(command, "--recipe", "digits", *options)
    assert result.code == 0 and "model_args: alpha, patches of a start, which the weights of local-dir:" in result.err
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["model_args"] == {}


def test_a_net_of_timms_own_is_fine_tuned_by_the_shipped_recipe(hub, command, tmp_path, photo_folder):
    source = timm.create_model("test_resnet")
    hub.put("timm/test_resnet.r160_in1k", {"model.safetensors": safetensors.torch.save(source.state_dict())})
    settings = [f"data.source={photo_folder}", "data.image_size=32", "epochs=1", "freeze=1", "warmup_epochs=0"]
    settings += ["batch_size=16"]
    options = [word for setting in settings for word in ("--set", setting)]
    options += ["--init-from", "test_resnet.r160_in1k", "--output", tmp_path / "tuned"]
    result = here(command, "--recipe", "finetune", *options)
    assert result.code == 0, result.err
    tuned, start_weights = weights(tmp_path / "tuned"), source.state_dict()
    assert tuned["fc.weight"].shape == (2, 96)
    for key, value in start_weights.items():
        if key.endswith(("weight", "running_mean", "running_var")) and not key.startswith("fc"):
            assert torch.equal(tuned[key], value) == key.startswith(("conv1", "bn1")), key
    result = command(evaluate.main, f"local-dir:{tmp_path / 'tuned'}", "--device", "cpu")
    assert result.code == 0 and "on 16 images of 2 classes" in result.out


def test_init_from_is_taken_as_it_is_typed(command, tmp_path):
    place = f"local-dir:{tmp_path}/run #2: x"
    result = command(train.main, "--recipe", "digits", "--output", tmp_path / "run", "--init-from", place)
    assert result.code == 2 and "run #2: x" in result.err
    assert not (tmp_path / "run").exists(), "a run that never began leaves no folder"
    (tmp_path / "mine").mkdir()
    command(train.main, "--recipe", "digits", "--output", tmp_path / "mine", "--init-from", place)
    assert (tmp_path / "mine").is_dir(), "the user's own folder stays"


def test_nets_of_one_size_are_made_for_another_or_told(command, tmp_path):
    options = ["--recipe", "digits", "--set", "model=vit_tiny_patch16_224", "--set", "data.image_size=16"]
    options += ["--set", "epochs=1", "--set", "warmup_epochs=0", "--set", "data.train_images=128", "--device", "cpu"]
    options += ["--set", "optimizer={name: adamw, lr: 0.001}", "--output", tmp_path / "vit"]
    made = ["--set", "model_args={in_chans: 1, img_size: 16, depth: 1, embed_dim: 24, num_heads: 1}"]
    assert "takes images of 224 px alone" in command(train.main, *options).err
    result = command(train.main, *options, *made)
    assert result.code == 0, result.err
    arguments = [f"local-dir:{tmp_path / 'vit'}", "--device", "cpu"]
    assert "on 360 images" in command(evaluate.main, *arguments).out
    result = command(evaluate.main, *arguments, "--image-size", 32)
    assert result.code == 2 and "takes images of 16 px alone" in result.err


def test_fine_tuning_does_not_overwrite_what_it_starts_from(finished, command, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(finished, source)
    before = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    options = ["--init-from", f"local-dir:{source}", "--output", source, "--device", "cpu", "--overwrite"]
    result = command(train.main, "--recipe", "digits", *TINY, *options)
    assert result.code == 2 and "choose another with --output" in result.err
    assert before == {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}


def test_layer_decay_gives_early_layers_smaller_steps(finished, command, tmp_path):
    options = ["--set", "optimizer={name: adamw, lr: 0.001, layer_decay: 0.5}", "--device", "cpu"]
    result = command(
        train.main, "--recipe", "digits", *TINY, *options, "--init-from", f"local-dir:{finished}", "--output",
        tmp_path / "tuned",
    )  # fmt: skip
    assert result.code == 0, result.err
    moved = {key: (weights(tmp_path / "tuned")[key] - value).abs().mean() for key, value in weights(finished).items()}
    assert moved["layer1.0.conv1.weight"] < 0.1 * moved["layer3.2.conv1.weight"]


def test_a_signal_while_the_data_is_read_stops_the_run(command, tmp_path, monkeypatch):
    build, before = engine.build, signal.getsignal(signal.SIGTERM)

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*args)

    monkeypatch.setattr(engine, "build", interrupted)
    result = command(train.main, "--recipe", "digits", *TINY, "--output", tmp_path / "run", "--device", "cpu")
    assert result.code == 143 and "stopped by SIGTERM" in result.err
    assert signal.getsignal(signal.SIGTERM) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ([], "the same command goes on"),
        (["--overwrite"], "the same command without --overwrite goes on"),
        (["--set", "resume=never"], "the same command with --set resume=auto goes on"),
    ],
)
def test_how_to_go_on_is_told_as_it_is(options, again, command, tmp_path, monkeypatch):
    save = engine._save

    def interrupted(trainer):
        save(trainer)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine, "_save", interrupted)
    arguments = ["--recipe", "digits", *TINY, "--output", tmp_path / "run", "--device", "cpu", *options]
    result = command(train.main, *arguments)
    assert result.code == 143 and again in result.err
    monkeypatch.undo()
    words = again.split()
    arguments = [word for word in arguments if word != "--overwrite"] + (words[4:6] if "resume=auto" in words else [])
    result = command(train.main, *arguments)
    assert result.code == 0 and "resumed at step" in result.err


def test_a_signal_after_the_last_place_to_save_reaches_whoever_waits_for_it(tmp_path, monkeypatch):
    finish, heard = engine._finish, []

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(*args)

    monkeypatch.setattr(engine, "_finish", interrupted)
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        recipe = load_recipe("digits", [word for word in TINY if word != "--set"])
        engine.train(recipe, tmp_path / "run", CPU)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert (tmp_path / "run" / "results.json").is_file()


def test_streaming_augments_as_the_recipe_says_and_no_more(photo_folder):
    settings = [f"data.source={photo_folder}", "data.pipeline=streaming", "model_args={in_chans: 3}", "batch_size=8"]
    settings += ["augment={flip: false, crop_scale: [0.5, 1.0]}", "data.workers=0"]
    view = View((3, 24, 24), (0.5,) * 3, (0.5,) * 3)
    batches = build_pipeline(load_recipe("digits", settings), view, CPU)
    steps = str(batches._training_loader(batches.train).dataset.transform)
    assert "RandomResizedCrop" in steps and "scale=(0.5, 1.0)" in steps
    assert "Jitter" not in steps and "Flip" not in steps
    with pytest.raises(UserError, match=r"set augment\.crop_scale"):
        load_recipe("digits", ["data.pipeline=streaming", "augment={}"])
    batches.classes = ["one"]
    with pytest.raises(UserError, match="an image is of class 1, but the net knows classes 0 to 0"):
        list(batches.epoch(0))


@pytest.mark.parametrize("pipeline", ["resident", "streaming"])
def test_crops_smaller_than_the_images_that_are_validated(pipeline, photo_folder):
    settings = [f"data.source={photo_folder}", f"data.pipeline={pipeline}", "data.image_size=24", "data.train_size=16"]
    settings += ["augment={crop_scale: [0.5, 1.0]}", "model_args={in_chans: 3}", "batch_size=8", "data.workers=0"]
    recipe = load_recipe("digits", settings)
    view = View((3, 24, 24), (0.5,) * 3, (0.5,) * 3)
    batches = build_pipeline(recipe, view, CPU)
    assert next(batches.epoch(0))[0].shape == (8, 3, 16, 16)
    assert next(batches.validation())[0].shape[1:] == (3, 24, 24)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_trains_on_a_folder_and_resumes_exactly(workers, photo_folder, tmp_path, command):
    settings = ["data.pipeline=streaming", "data.image_size=16", f"data.workers={workers}", "batch_size=8", "epochs=2"]
    settings += ["save_minutes=1e-6"]
    settings += ["augment.shift=0", "augment.crop_scale=[0.5, 1.0]", "augment.mixup=0.2", "warmup_epochs=0"]
    settings += [f"data.source={photo_folder}", "model_args={in_chans: 3}", "data.loader={re_prob: 0.2}"]
    options = [word for setting in settings for word in ("--set", setting)]
    for name in ("one", "two"):
        result = command(train.main, "--recipe", "digits", *options, "--output", tmp_path / name, "--device", "cpu")
        assert result.code == 0, result.err
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    # interrupted in the second epoch, between two steps
    program = with_step(tmp_path / "program.py", "if at == 8: os.killpg(0, signal.SIGTERM)")
    process = start("--recipe", "digits", *options, "--output", tmp_path / "three", program=program)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in err, err
    result = command(train.main, "--recipe", "digits", *options, "--output", tmp_path / "three", "--device", "cpu")
    assert result.code == 0 and "resumed at step" in result.err
    assert same(weights(tmp_path / "one"), weights(tmp_path / "three"))
    streamed = json.loads((tmp_path / "one" / "results.json").read_text())["raw"]
    result = command(evaluate.main, f"local-dir:{tmp_path / 'one'}", "--device", "cpu")
    assert result.code == 0 and f"{100 * streamed['top1']:.2f}%" in result.out


@pytest.mark.skipif(sys.platform != "linux", reason="the loader processes are forked")
@pytest.mark.parametrize("fault", ["killed", "unreadable"])
def test_what_befalls_a_loader_process_is_one_line_and_ends_the_run(fault, photo_folder, tmp_path):
    source, patch = photo_folder, ""
    if fault == "killed":  # one of two; the other one waits for its parent meanwhile
        patch = "pipelines.ignore_signals = lambda worker: ignore(worker) or worker and os.kill(os.getpid(), 9)\n"
    else:
        source = shutil.copytree(photo_folder, tmp_path / "photos")
        for path in (source / "train").rglob("*.jpg"):
            path.write_bytes(b"no image")
    (tmp_path / "program.py").write_text(
        f"import os\nfrom training import pipelines, train\nignore = pipelines.ignore_signals\n{patch}train.main()\n"
    )
    settings = ["data.pipeline=streaming", "data.image_size=16", "data.workers=2", "batch_size=8", "epochs=1"]
    settings += ["augment.shift=0", "augment.crop_scale=[0.5, 1.0]", "warmup_epochs=0", f"data.source={source}"]
    options = [word for setting in [*settings, "model_args={in_chans: 3}"] for word in ("--set", setting)]
    program = [str(tmp_path / "program.py")]
    process = start("--recipe", "digits", *options, "--output", tmp_path / "run", program=program)
    _, err = process.communicate(timeout=60)
    words = {"killed": f"error: reading {source}: DataLoader worker", "unreadable": "error: none of the training"}
    assert process.returncode == 2 and "Traceback" not in err, err
    assert words[fault] in err, err


def test_shipped_recipes_are_valid_and_say_what_they_need():
    folder = REPOSITORY / "training" / "recipes"
    for path in folder.glob("*.yaml"):
        recipe = load_recipe(path.stem)
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(f"--recipe {path.stem}" in line for line in head), path
        assert any("accuracy" in line.lower() or "not been run" in line for line in head), path
        assert recipe.model in timm.list_models("risotto_*")
    assert yaml.safe_load((folder / "digits.yaml").read_text())["data"]["source"] == "digits"


def test_rows_and_files_hold_what_the_run_did(tmp_path, monkeypatch):
    """Training loss and accuracy are those of the nets that the steps began with, validation is that of the files."""
    seen, step = [], engine._step

    def watched(trainer, update, images, targets):
        with torch.no_grad():
            logits = trainer.model(images)
        right = (logits.argmax(1) == targets.argmax(1)).sum().item()
        seen.append((len(images), F.cross_entropy(logits, targets).item() * len(images), right))
        return step(trainer, update, images, targets)

    monkeypatch.setattr(engine, "_step", watched)
    recipe = load_recipe("digits", [*TINY[1::2], "ema_decay=0.5"])
    folder = tmp_path / "run"
    with stopping_after_an_epoch(monkeypatch), pytest.raises(engine.Stopped):
        engine.train(recipe, folder, CPU)
    assert len(read_metrics(folder)) == 1, "a running training can be watched"
    results = engine.train(recipe, folder, CPU)
    rows = read_metrics(folder)
    for i, row in enumerate(rows):
        images, loss, correct = (sum(column) for column in zip(*seen[11 * i : 11 * (i + 1)], strict=True))
        assert row["train_loss"] == pytest.approx(loss / images, rel=1e-4) and row["train_top1"] == correct / images
    pipeline = engine.build(recipe, tmp_path, CPU).pipeline
    other = "raw" if results["better"] == "ema" else "ema"
    for key, file in ((results["better"], "model.safetensors"), (other, f"model_{other}.safetensors")):
        net = timm.create_model(f"local-dir:{folder}", checkpoint_path=folder / file).eval()
        found, column = evaluate_net(net, pipeline.validation(), CPU.sum), {"raw": "val", "ema": "ema"}[key]
        assert results[key]["top1"] == found.top1 == rows[-1][f"{column}_top1"]
        assert results[key]["loss"] == pytest.approx(found.loss, rel=1e-6)
        assert rows[-1][f"{column}_loss"] == pytest.approx(found.loss, rel=1e-6)
    assert abs(results["raw"]["loss"] - results["ema"]["loss"]) > 1e-3
    assert results["better"] == max(("raw", "ema"), key=lambda key: results[key]["top1"])


def test_the_better_weights_are_those_that_everyone_loads(tmp_path):
    trainer = engine.build(load_recipe("digits", ["ema_decay=0.5"]), tmp_path, CPU)
    trainer.model.fc.bias.data.fill_(1)
    for better, net in (("raw", trainer.model), ("ema", trainer.ema.module)):
        hashes = engine._export(trainer, better)
        assert same(weights(tmp_path), net.state_dict())
        assert {path.name for path in tmp_path.glob("model*")} == hashes.keys()


def test_what_a_recipe_trains_does_not_depend_on_what_is_released():
    for name in timm.list_models("risotto_*"):
        own, sibling = own_cfg(name), own_cfg(name.removesuffix("_bn").removesuffix("_c") + "_bn")
        assert own == sibling == engine._registered_config(name)
    assert own_cfg("risotto_resnet18")["input_size"] == (3, 224, 224) and own_cfg("resnet18") is None


def test_the_seed_decides_what_a_run_begins_with(tmp_path):
    nets = [engine.build(load_recipe("digits", [f"seed={seed}"]), tmp_path, CPU).model for seed in (0, 0, 1)]
    first, again, other = (net.state_dict() for net in nets)
    assert same(first, again) and not torch.equal(first["layer1.0.conv1.weight"], other["layer1.0.conv1.weight"])


def test_a_state_is_as_old_as_its_last_saving(tmp_path):
    trainer = engine.build(load_recipe("digits", ["save_minutes=1"]), tmp_path, CPU)
    for age, due in ((30, False), (61, True)):
        trainer.saved = time.perf_counter() - age
        assert engine._due(trainer) == due
    engine._save(trainer)
    assert not engine._due(trainer)


def test_a_signal_while_it_validates_saves_and_ends_the_run(command, tmp_path, monkeypatch):
    validate = engine._validate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)

    options = ["--recipe", "digits", *TINY, "--output", tmp_path / "run"]
    with monkeypatch.context() as patched:
        patched.setattr(engine, "_validate", interrupted)
        assert here(command, *options).code == 143
    step, _, facts, _ = engine.load_state(tmp_path / "run" / "state")
    assert step == 11 and not facts["progress"]["history"]
    assert here(command, *options).code == 0 and len(read_metrics(tmp_path / "run")) == 2


def test_a_second_signal_ends_a_run_that_cannot_save():
    with pytest.raises(KeyboardInterrupt), engine.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # of the same key
        assert stop.number == signal.SIGINT
        stop.since -= 2
        os.kill(os.getpid(), signal.SIGINT)


def test_states_are_saved_every_so_many_epochs_and_when_they_are_too_old(command, tmp_path, monkeypatch):
    saved, save = [], engine._save

    def due(trainer):
        return (trainer.progress.step, len(trainer.progress.history)) in ((7, 0), (22, 2))

    monkeypatch.setattr(engine, "_save", lambda trainer: saved.append(trainer.progress.step) or save(trainer))
    monkeypatch.setattr(engine, "_due", due)
    options = [*TINY, "--set", "epochs=5", "--set", "save_every=3", "--output", tmp_path / "run", "--device", "cpu"]
    assert command(train.main, "--recipe", "digits", *options).code == 0
    assert saved == [7, 22, 33, 55]


def test_a_run_resumed_on_another_machine_says_so(command, tmp_path, monkeypatch):
    options = ["--recipe", "digits", *TINY, "--output", tmp_path / "run", "--device", "cpu"]
    with stopping_after_an_epoch(monkeypatch):
        assert command(train.main, *options).code == 143
    here = engine.run_folder.hardware(torch.device("cpu"), 1)
    monkeypatch.setattr(engine.run_folder, "hardware", lambda *_: "another machine")
    assert command(train.main, *options).code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["hardware"] == f"{here} (0 min), then another machine (0 min)"


@pytest.fixture
def shards(photo_folder, tmp_path):
    """The photos as a WebDataset: shards to be read in order, and what timm reads about them."""
    root, splits = tmp_path / "shards", {}
    root.mkdir()
    for split, part, count in (("train", "train", 4), ("validation", "val", 2)):
        files = sorted(photo_folder.glob(f"{part}/*/*.jpg"), key=lambda path: path.name)
        names = [f"photos-{split}-{i}.tar" for i in range(count)]
        for i, name in enumerate(names):
            with tarfile.open(root / name, "w") as tar:
                for file in files[i::count]:
                    key = f"{file.parent.name}-{file.stem}"
                    label = tarfile.TarInfo(f"{key}.cls")
                    label.size = 1
                    tar.add(file, f"{key}.jpg")
                    tar.addfile(label, io.BytesIO(b"1" if file.parent.name == "flower" else b"0"))
        each = [len(files[i::count]) for i in range(count)]
        splits[split] = {"name": split, "filenames": names, "shard_lengths": each, "num_samples": sum(each)}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def test_a_set_that_is_read_in_order_is_trained_on_resumed_evaluated_and_released(
    shards, command, tmp_path, monkeypatch
):
    options = [
        "--recipe",
        "digits",
        "--set",
        "data={source: wds/photos, pipeline: streaming, workers: 1, image_size: 16}",
    ]
    options += ["--set", f"data.root={shards}", "--set", "augment={crop_scale: [0.5, 1.0]}", "--set", "batch_size=8"]
    options += ["--set", "model_args={in_chans: 3, num_classes: 2}", "--set", "epochs=2", "--set", "warmup_epochs=0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = here(command, *options, "--output", whole)
    assert result.code == 0 and "48 training and 16 validation images" in result.err, result.err
    with stopping_after_an_epoch(monkeypatch):
        assert here(command, *options, "--output", parts).code == 143
    assert here(command, *options, "--output", parts).code == 0
    assert same(weights(whole), weights(parts))
    reached = json.loads((whole / "results.json").read_text())["raw"]
    result = command(evaluate.main, f"local-dir:{whole}", "--device", "cpu", "--json", tmp_path / "report.json")
    assert result.code == 0, result.err
    [report] = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["top1"], report["streamed"]) == (16, reached["top1"], True)
    released = ["--tag", "photos", "--half", "--output", tmp_path / "release", "--device", "cpu"]
    assert command(release.main, whole, *released).code == 0
    results = json.loads((tmp_path / "release" / "results.json").read_text())
    assert results["evaluation"]["images"] == 16
    assert "pip install datasets" in command(evaluate.main, f"local-dir:{whole}", "--data", "hfds/x").err


def test_only_what_cannot_change_the_outcome_may_differ_when_a_run_goes_on(undisturbed, command, tmp_path, monkeypatch):
    reference = undisturbed
    options = [*EACH_STEP, "--output", tmp_path / "run"]
    with stopping_after_an_epoch(monkeypatch):
        assert here(command, *options).code == 143
    file = tmp_path / "run" / "recipe.yaml"
    file.write_text(file.read_text().replace("# torch ", "# torch 1.2.3 of "))
    result = here(command, *options, "--set", "label_smoothing=0.2", "--set", "log_every=7")
    assert result.code == 2 and "another recipe, by label_smoothing; pass --overwrite" in result.err
    assert here(command, *options, "--set", "log_every=7", "--set", "data.workers=1").code == 0
    assert "log_every: 7" in file.read_text() and "# torch 1.2.3 of " in file.read_text()
    assert same(weights(tmp_path / "run"), weights(reference))


def test_weights_without_a_state_are_not_another_recipes_to_replace(command, tmp_path, monkeypatch):
    options = ["--recipe", "digits", *TINY, "--set", "save_every=2", "--output", tmp_path / "run"]
    with stopping_after_an_epoch(monkeypatch):
        assert here(command, *options).code == 143
    before = weights(tmp_path / "run")
    assert not list((tmp_path / "run").glob("state/*.json"))
    assert "another recipe, by seed; pass --overwrite" in here(command, *options, "--set", "seed=1").err
    assert same(weights(tmp_path / "run"), before)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_training_on_a_gpu_learns_and_evaluates_as_on_the_cpu(amp, command, tmp_path):
    options = ["--set", f"amp={amp}", "--set", "channels_last=true", "--output", tmp_path / "run", "--device", "cuda"]
    assert command(train.main, "--recipe", "digits", *options).code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["raw"]["top1"] > 0.95 and "NVIDIA" in results["hardware"]
    numbers = tmp_path / "numbers.json"
    assert command(evaluate.main, f"local-dir:{tmp_path / 'run'}", "--device", "cpu", "--json", numbers).code == 0
    [measured] = json.loads(numbers.read_text())
    assert measured["top1"] == pytest.approx(results["raw"]["top1"], abs=1 / 360)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_as_a_cuda_graph_is_the_same_step(optimizer, command, tmp_path, monkeypatch):
    """Over warm-up, schedule and the averaged weights, in few steps: sums in another order part two trainings soon.

    Muon parts them at once: its iteration in bfloat16 makes of a change of 1e-7 in the weights a third of their way in
    ten steps, on a CPU without any graph. So of Muon's steps the losses are compared, of AdamW's the weights, too.
    """
    options = ["--set", "epochs=2", "--set", "data.train_images=256", "--set", "ema_decay=0.9", "--set", "tf32=false"]
    if optimizer == "adamw":
        options += ["--set", "optimizer={name: adamw, lr: 0.001, weight_decay: 0.01}"]
    update, calls, losses = engine._update, [], {}
    monkeypatch.setattr(engine, "_update", lambda *args: calls.append(1) or update(*args))
    for graph, count in (("true", WARMUP + 1), ("false", 2 * 4)):
        chosen = [*options, "--set", f"cuda_graph={graph}", "--output", tmp_path / graph, "--device", "cuda"]
        assert command(train.main, "--recipe", "digits", *chosen).code == 0
        assert len(calls) == count
        calls.clear()
        losses[graph] = [row["train_loss"] for row in read_metrics(tmp_path / graph)]
    assert losses["true"] == pytest.approx(losses["false"], rel=5e-3)
    if optimizer == "muon":
        return
    start = engine.build(load_recipe("digits"), tmp_path, CPU).model.state_dict()
    for kind in ("raw", "ema"):
        graphed, plain = (weights(tmp_path / graph, kind) for graph in ("true", "false"))
        apart = sum((graphed[key] - value).square().sum() for key, value in plain.items()).sqrt()
        moved = sum((start[key] - value).square().sum() for key, value in plain.items()).sqrt()
        assert apart < 0.1 * moved


@pytest.mark.slow
def test_compiled_training(command, tmp_path):
    options = ["--set", "compile=true", "--output", tmp_path / "run", "--device", "cpu"]
    assert command(train.main, "--recipe", "digits", *TINY, *options).code == 0
