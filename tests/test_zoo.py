"""The zoo's own pipeline at toy size: train what is missing, stop when the time is over, release, pack."""

import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import psutil
import pytest
import yaml

from training import cards, engine, release, tables, zoo
from training.recipe import load_recipe
from training.state import load_state

TOY = {
    "model": "risotto_resnet20",
    "epochs": 1,
    "batch_size": 256,
    "data": {"source": "digits", "image_size": 8},
    "model_args": {"in_chans": 1},
    "optimizer": {"name": "muon", "lr": 0.003},
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A zoo of one row and its twin in a repository of its own."""
    root = tmp_path / "repository"
    (root / "risotto_zoo").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", root], check=True)
    (root / "README.md").write_text("# Zoo\n<!-- results -->\n<!-- /results -->\n")
    for module in (cards, release):
        monkeypatch.setattr(module, "CARDS", root / "model_cards")
        monkeypatch.setattr(module, "PACKAGE", root / "risotto_zoo")
    monkeypatch.setattr(cards, "ROOT", root)
    monkeypatch.setattr(tables, "pages", lambda: {root / "tables": b""})
    for name, changes in {"toy": {}, "toy_bn": {"model": "risotto_resnet20_bn"}}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**TOY, **changes}))
    rows = [{"recipe": str(tmp_path / "toy.yaml"), "twin": str(tmp_path / "toy_bn.yaml"), "tag": "digits"}]
    (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(rows))
    monkeypatch.setattr(zoo, "ROWS", tmp_path / "zoo.yaml")
    return root


def test_a_row_is_trained_once_and_released_with_its_twin(toy, command, tmp_path, monkeypatch):
    result = command(zoo.main, "--runs", tmp_path / "runs", "--device", "cpu")
    assert result.code == 0, result.err
    names = {path.name for path in (toy / "model_cards").iterdir() if path.is_dir()}
    assert names == {"risotto_resnet20.digits", "risotto_resnet20_bn.digits"}
    manifest = json.loads((toy / "risotto_zoo" / "manifest.json").read_text())
    for name in names:
        weights = toy / "model_cards" / name / "model.safetensors"
        assert weights.is_symlink() and weights.resolve() == toy / "risotto_zoo" / "weights" / f"{name}.safetensors"
        assert manifest[name]["bytes"] == weights.stat().st_size
        assert manifest[name]["location"] == "package" and manifest[name]["revision"] == "v1"
        assert f"`{name.split('.')[0]}`" in (toy / "README.md").read_text()
        results = json.loads((toy / "model_cards" / name / "results.json").read_text())
        assert [row["model"] for row in results["baselines"]] == [n.split(".")[0] for n in sorted(names - {name})]
    assert (toy / "tables").is_file()
    before = {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()}
    monkeypatch.setattr(zoo, "train", lambda *_: pytest.fail("a finished run was run again"))
    assert command(zoo.main, "--runs", tmp_path / "runs", "--device", "cpu").code == 0
    assert {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()} == before
    assert command(zoo.main, "--runs", tmp_path / "runs", "--device", "cpu", "--set", "log_every=7").code == 0
    result = command(zoo.main, "--runs", tmp_path / "runs", "--device", "cpu", "--set", "epochs=2")
    assert result.code == 2 and "holds a run of another recipe" in result.err


def test_the_time_ends_a_run_and_the_next_one_goes_on(toy, command, tmp_path):
    base = ["--runs", tmp_path / "runs", "--device", "cpu"]
    result = command(zoo.main, *base, "--minutes", 0.06, "--set", "epochs=400")
    assert result.code == 0 and "the same command goes on" in result.err
    assert not (toy / "model_cards").exists()
    assert (tmp_path / "runs" / "toy" / "state").is_dir()
    result = command(zoo.main, *base, "--minutes", 0.04, "--set", "epochs=400")
    assert "resumed at step" in result.err


def test_packed_runs_come_in_pieces_and_go_together_again(toy, command, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "PIECE", 500_000)
    collect, packed = zoo.collect, []
    monkeypatch.setattr(zoo, "collect", lambda run, output: packed.append(run.name) or collect(run, output))
    result = command(zoo.main, "--runs", tmp_path / "runs", "--device", "cpu", "--collect", tmp_path / "out")
    assert result.code == 0 and not (toy / "model_cards").exists()
    assert packed == ["toy", "toy_bn"]
    pieces = sorted((tmp_path / "out").glob("toy.tar.*"))
    assert len(pieces) > 1 and all(piece.stat().st_size <= 500_000 for piece in pieces)
    (tmp_path / "again").mkdir()
    subprocess.run(f"cat {tmp_path}/out/toy.tar.* | tar -x -C {tmp_path}/again", shell=True, check=True)
    original = tmp_path / "runs" / "toy"
    for path in (tmp_path / "again" / "toy").iterdir():
        assert path.read_bytes() == (original / path.name).read_bytes()
    shutil.rmtree(original)
    shutil.move(tmp_path / "again" / "toy", original)
    with monkeypatch.context() as patched:
        patched.setattr(zoo, "release", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        result = command(zoo.main, "--runs", tmp_path / "runs", "--device", "cpu")
        assert result.code == 2 and "is left out: [Errno 28] No space left on device" in result.err
    assert command(zoo.main, "--runs", tmp_path / "runs", "--device", "cpu").code == 0
    assert (toy / "model_cards" / "risotto_resnet20.digits" / "README.md").is_file()


def test_runs_at_once_are_stopped_packed_and_go_on_elsewhere(toy, command, tmp_path):
    away, home, settings = tmp_path / "away", tmp_path / "home", ["--set", "epochs=400", "--set", "save_minutes=1e-9"]
    over = threading.Event()

    def stop():
        while not all(list((away / name / "state").glob("*.json")) for name in ("toy", "toy_bn")):
            if over.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    base = ["--device", "cpu", *settings]
    result = command(zoo.main, *base, "--runs", away, "--jobs", 2, "--collect", tmp_path / "out", "--minutes", 1)
    over.set()
    thread.join()
    assert result.code == 143 and "the same command goes on" in result.err, result
    home.mkdir()
    for name in ("toy", "toy_bn"):
        assert "400 epochs of" in (away / "logs" / f"{name}.txt").read_text()
        subprocess.run(f"cat {tmp_path}/out/{name}.tar.* | tar -x -C {home}", shell=True, check=True)
        assert load_state(home / name / "state")[0] > 0
    result = command(zoo.main, *base, "--runs", home, "--minutes", 0.05)
    assert result.code == 0 and "resumed at step" in result.err, result


def test_rows_at_once_are_released_and_what_fails_is_told(toy, command, tmp_path):
    missing = {**TOY, "data": {"source": str(tmp_path / "nowhere")}}
    (tmp_path / "missing.yaml").write_text(yaml.safe_dump(missing))
    rows = [{"recipe": str(tmp_path / f"{name}.yaml"), "tag": "digits"} for name in ("missing", "toy")]
    zoo.ROWS.write_text(yaml.safe_dump(rows))
    result = command(zoo.main, "--runs", tmp_path / "runs", "--device", "cpu", "--jobs", 2)
    assert result.code == 2 and "missing.yaml is left out: error:" in result.err, result
    assert str(tmp_path / "nowhere") in result.err and "Traceback" not in result.err
    assert (toy / "model_cards" / "risotto_resnet20.digits" / "README.md").is_file()


def test_a_training_that_the_system_kills_is_told(toy, command, tmp_path):
    over = threading.Event()

    def kill():
        while not over.wait(0.05):
            for process in psutil.Process().children():
                if "training.train" in process.cmdline() and list((tmp_path / "runs").glob("*/state/*.json")):
                    return process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    zoo.ROWS.write_text(yaml.safe_dump([{"recipe": str(tmp_path / "toy.yaml"), "tag": "digits"}]))
    settings = ["--set", "epochs=400", "--set", "save_minutes=1e-9"]
    result = command(zoo.main, "--runs", tmp_path / "runs", "--device", "cpu", "--jobs", 2, *settings)
    over.set()
    thread.join()
    assert result.code == 137 and "toy.yaml is left out: error: killed by SIGKILL" in result.err, result


def test_a_row_that_cannot_be_done_keeps_no_other_from_it(toy, command, tmp_path):
    missing = {**TOY, "data": {"source": str(tmp_path / "nowhere")}}
    (tmp_path / "missing.yaml").write_text(yaml.safe_dump(missing))
    rows = [{"recipe": str(tmp_path / "missing.yaml"), "tag": "nowhere"}, *yaml.safe_load(zoo.ROWS.read_text())]
    zoo.ROWS.write_text(yaml.safe_dump(rows))
    result = command(zoo.main, "--runs", tmp_path / "runs", "--device", "cpu")
    assert result.code == 2 and "nowhere" in result.err and "missing.yaml is left out" in result.err
    assert (toy / "model_cards" / "risotto_resnet20.digits" / "README.md").is_file()


def test_a_row_that_diverges_is_told_by_the_exit_code(toy, command, tmp_path, monkeypatch):
    def train(*_):
        raise zoo.Diverged("the loss is not finite")

    monkeypatch.setattr(zoo, "train", train)
    result = command(zoo.main, "--runs", tmp_path / "runs", "--device", "cpu")
    assert result.code == 3 and "is left out: the loss is not finite" in result.err


def test_what_is_finished_when_a_signal_comes_is_packed(toy, command, tmp_path, monkeypatch):
    trained = []

    def train(recipe, folder, world):
        trained.append(recipe.model)
        if len(trained) == 2:
            raise zoo.Stopped(15)
        return engine.train(recipe, folder, world)

    monkeypatch.setattr(zoo, "train", train)
    result = command(zoo.main, "--runs", tmp_path / "runs", "--device", "cpu", "--collect", tmp_path / "out")
    assert result.code == 143 and trained == ["risotto_resnet20", "risotto_resnet20_bn"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["toy.tar.0000"]


def test_rows_are_shipped_recipes_and_unknown_ones_are_told(command):
    for row in zoo.load_rows([]):
        twin = load_recipe(row.twin)
        recipe = load_recipe(row.recipe)
        assert twin.model == f"{recipe.model}_bn"
        assert twin.data == recipe.data and twin.epochs == recipe.epochs and twin.augment == recipe.augment
        assert Path(recipe.data.source).name == row.tag
    result = command(zoo.main, "cifar10_resnet21")
    assert result.code == 2 and "did you mean 'cifar10_resnet20'" in result.err
