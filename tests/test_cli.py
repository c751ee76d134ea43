"""The command risotto-zoo, the README's promises, and the frame of the project."""

import argparse
import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from risotto_zoo import cli
from training import benchmark

REPOSITORY = Path(__file__).parent.parent


def test_list_prints_the_known_sizes(command):
    result = command(cli.main, "list", "risotto_resnet*18*")
    assert result.code == 0
    lines = {line.split()[0]: line.split() for line in result.out.splitlines()[1:]}
    assert len(lines) == 6
    assert lines["risotto_resnet18_bn"][1:6] == ["11.69", "M", "1.814", "G", "3x224x224"]
    assert command(cli.main, "list", "rissotto_resnet20").err.startswith("error: no model matches")


def test_inspect_prints_isometry_and_draws_it(command, tmp_path):
    result = command(cli.main, "inspect", "risotto_resnet20", "--output", tmp_path / "a.png")
    assert result.code == 0, result.err
    assert float(re.search(r"largest distance from 1: (\S+)", result.out)[1]) < 1e-5
    assert "layer3.2" in result.out and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    patches = command(cli.main, "inspect", "risotto_resnet20", "--patches", "--output", tmp_path / "p.png")
    assert float(re.search(r"largest distance from 1: (\S+)", patches.out)[1]) < 1e-5
    ranks = [int(re.search(r"singular values: (\d+) from", result.out)[1]) for result in (result, patches)]
    assert ranks == [3 * 16, 32 * 16] and "init=risotto, patches, 3x16x16 images" in patches.out
    norms = [float(re.search(r"layer1\.0 +(\S+)", found.out)[1]) for found in (result, patches)]
    assert norms[1] == pytest.approx((3 * 16 * 16) ** 0.5, rel=0.1) and norms[0] < norms[1] / 2  # one pixel of 16
    he = command(cli.main, "inspect", "risotto_resnet20", "--init", "he", "--output", tmp_path / "b")
    assert float(re.search(r"largest distance from 1: (\S+)", he.out)[1]) > 10
    assert f"figure: {tmp_path / 'b.png'}" in he.out and (tmp_path / "b.png").is_file()


def test_inspect_an_image_by_probes(command, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    result = command(
        cli.main, "inspect", "risotto_resnet20_c", "--image", tmp_path / "x.png", "--output", tmp_path / "o.png"
    )
    assert result.code == 0, result.err
    assert "random probes" in result.out
    assert float(re.search(r"largest distance from 1: (\S+)", result.out)[1]) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "risotto_resnet21"], "did you mean 'risotto_resnet"),
        (["inspect", "resnet18"], "not a model of this zoo"),
        (["inspect", "risotto_resnet20", "--init", "hee"], "did you mean 'he'"),
        (["inspect", "risotto_resnet20", "--alpha", "0"], "alpha=0"),
        (["inspect", "risotto_resnet20", "--rotated-pairs", "0"], "rotated_pairs is 0"),
        (["inspect", "risotto_resnet20", "--image", "nowhere.png"], "the file does not exist"),
        (["inspect", "risotto_resnet20", "--output", "/no/where.png"], "cannot be written"),
        (["inspect", "risotto_resnet20", "--output", "/"], "figure / is a folder; name a file"),
        (["inspect", "risotto_resnet20", "--output", "a.foo"], "a figure is a .png, .svg or .pdf file, not .foo"),
        (["inspect", "risotto_resnet20", "--init", "None"], "not 'None'\n"),
        (["inspect", "risotto_resnet20", "--seed", str(2**70)], f"seed is {2**70}, not a whole number"),
        (["inspect", "risotto_resnet110", "--init", "he", "--alpha", "100"], "no finite signal"),
        (["predict", "x.png", "--model", "resnet18.a1_in1K"], "Invalid pretrained tag"),
        (["predict", "x.png", "--model", "risotto_resnet20.cifar10"], "did you mean 'risotto_resnet20.cifar10-jpeg'?"),
        (["predict", "x.png", "--model", "resnet56.cifar10-jpeg"], "did you mean 'risotto_resnet56.cifar10-jpeg'"),
        (["predict", "x.png", "--model", "RISOTTO_resnet20"], "did you mean 'risotto_resnet20'"),
        (["predict", "x.png", "--top", "0"], "--top is 0"),
        (["predict", "x.png", "--device", "meta"], "device meta: "),
    ],
)
def test_wrong_arguments_are_one_line(arguments, words, command):
    result = command(cli.main, *arguments)
    assert result.code == 2 and words in result.err and "Traceback" not in result.err
    assert result.err.strip().count("\n") == 0


def test_a_folder_that_may_not_be_read_is_named(command, monkeypatch, tmp_path):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    result = command(cli.main, "predict", tmp_path)
    assert result.code == 2 and result.err == f"error: {tmp_path}: Permission denied\n"


PROGRAMS = ("train", "evaluate", "benchmark", "export", "release", "publish", "study", "zoo", "cards", "tables")


@pytest.mark.parametrize("module", ["risotto_zoo.cli", *(f"training.{name}" for name in PROGRAMS)])
def test_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert not stop.value.code and "usage:" in capsys.readouterr().out


def test_importing_registers_and_pulls_in_no_trainer():
    code = "import sys, risotto_zoo, timm; assert timm.is_model('risotto_resnet20'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    packages = {name.split(".")[0] for name in loaded}
    assert packages.isdisjoint({"matplotlib", "sklearn", "pydantic", "training"})


def imported(path, library):
    """The modules and packages of the library that a file of it imports."""
    place, found = [library.name, *path.relative_to(library).parent.parts], set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in getattr(node, "names", ())] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = place[: len(place) + 1 - node.level] if node.level else []
            base += [node.module] if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith(f"{library.name}.")}
    return found


def test_imports_run_one_way():
    """design: initializers and isometry know neither timm nor each other; the library does not know training."""
    library = REPOSITORY / "risotto_zoo"
    for path in [*(library / "initializers").glob("*.py"), library / "isometry.py"]:
        text = path.read_text()
        assert not re.search(r"^(from|import) (timm|torchvision)", text, re.M), path
        known = r"\.\." if path.parent.name == "initializers" else r"\."  # their own folder alone, and nothing
        assert not re.search(rf"^\s*(from|import) (risotto_zoo|{known})", text, re.M), path
    above = set()
    for name in ("cli", "loading", "creation", "registry", "hub", "checkpoints", "models", "initializers"):
        for path in (library / name).glob("*.py") if (library / name).is_dir() else [library / f"{name}.py"]:
            assert not imported(path, library) & above, path
        above.add(name)
    for path in library.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) training", path.read_text(), re.M), path


@pytest.fixture
def few_images(monkeypatch):
    sample_folder = benchmark._sample_folder
    monkeypatch.setattr(benchmark, "_sample_folder", lambda folder, **_: sample_folder(folder, count=32))


def test_benchmarks_compare_with_a_peer(command, tmp_path, few_images):
    result = command(benchmark.main, "init", "--models", "resnet18", "--rounds", 2, "--json", tmp_path / "rows.json")
    assert result.code == 0 and "timm resnet18" in result.out and "torchvision resnet18" in result.out
    result = command(
        benchmark.main, "step", "--models", "risotto_resnet20", "--rounds", 2, "--batch", 4, "--device", "cpu"
    )
    assert result.code == 0 and "risotto_resnet20_bn" in result.out
    small = ["--models", "risotto_resnet20", "--rounds", 2, "--batch", 4, "--device", "cpu", "--modes", "eager"]
    result = command(benchmark.main, "infer", *small, "--json", tmp_path / "rows.json")
    assert result.code == 0 and "risotto_resnet20_bn, folded" in result.out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all(row["memory"][0] > 0 for row in rows)
    result = command(benchmark.main, "evaluate", "--rounds", 2, "--workers", 0, "--device", "cpu")
    assert result.code == 0 and "cached" in result.out
    result = command(benchmark.main, "input", "--rounds", 2, "--batch", 16, "--workers", 0, "--device", "cpu")
    assert result.code == 0 and "resident pipeline" in result.out and "streaming pipeline" in result.out
    result = command(benchmark.main, "load", "--rounds", 2, "--models", "risotto_resnet20.cifar10-jpeg")
    assert result.code == 0 and "creating it + reading the file" in result.out


def test_nets_that_are_compared_have_one_head(few_images, monkeypatch):
    """By its name alone a net has the classes of its release."""
    heads = []
    args = argparse.Namespace(models=["risotto_resnet18"], rounds=2, batch=2, amp=None, modes=["eager"], device="cpu")

    def note(names, nets, *_):
        heads.extend(net.num_classes for net in nets)
        return []

    monkeypatch.setattr(benchmark, "_inference", note)
    benchmark.infer_rows(args)
    monkeypatch.setattr(benchmark, "build_optimizer", lambda model, _: heads.append(model.num_classes))
    for name in ("risotto_resnet18", "risotto_resnet18_bn"):
        benchmark._step(name, args, torch.device("cpu"))
    assert len(heads) > 4 and set(heads) == {1000}


def test_where_a_benchmarks_rows_go_is_asked_before_it_runs(command, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmark.BENCHMARKS, "init", lambda _: pytest.fail("it was measured first"))
    (tmp_path / "file").touch()
    result = command(benchmark.main, "init", "--json", tmp_path / "file" / "rows.json")
    assert result.code == 2 and "rows.json cannot be written" in result.err


def test_trainings_at_once_are_compared_with_one_after_another(command, monkeypatch, no_processes, few_images):
    monkeypatch.setattr(benchmark, "cores", lambda: 1)
    result = command(benchmark.main, "jobs", "--rounds", 2, "--batch", 32, "--device", "cpu")
    assert result.code == 0 and "1 trainings of risotto_resnet20 at once" in result.out


def test_a_folded_net_computes_what_the_net_with_batch_norm_does():
    for name in ("risotto_resnet20_bn", "risotto_resnet50_cifar_bn"):
        twin = benchmark._with_statistics(timm.create_model(name, dtype=torch.float64))
        folded, images = benchmark.folded(twin), torch.randn(2, 3, 32, 32, dtype=torch.float64)
        assert not [module for module in folded.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        with torch.no_grad():
            torch.testing.assert_close(folded(images), twin(images))


def test_generated_tables_are_fresh(command):
    from training import tables

    assert command(tables.main, "--check").code == 0


def test_a_place_that_cannot_be_written_is_one_line(command, monkeypatch):
    from training import files, tables

    def refuse(path, _data):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tables, "sweep_table", lambda: "| other |")
    monkeypatch.setattr(files, "write_atomically", refuse)
    result = command(tables.main)
    assert result.code == 2 and result.err.endswith("NOTES.md cannot be written: Permission denied\n"), result


def test_a_stale_table_is_told(command, monkeypatch):
    from training import tables

    monkeypatch.setattr(tables, "sweep_table", lambda: "| other |")
    result = command(tables.main, "--check")
    assert result.code == 2 and result.err.startswith("error: stale: training/recipes/NOTES.md")


def test_ci_runs_the_commands_of_the_readme():
    commands = re.findall(r"```bash\n(python3 -m venv .*?)\n```", (REPOSITORY / "README.md").read_text(), re.S)
    assert len(commands) == 2
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert all(line in script for command in commands for line in command.splitlines())
