"""Exported files agree with PyTorch at any batch size, carry what they need, and are written whole or not at all."""

import csv
import io
import json
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch

from risotto_zoo.checkpoints import model_config, save_model
from risotto_zoo.errors import UserError
from training import evaluate, export
from training.data import View


def folder_of(name, path, **kwargs):
    """A model folder with weights that nobody has trained, of a net with a batch norm's statistics if it has one."""
    model = timm.create_model(name, num_classes=10, seed=0, **kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    cfg = model.pretrained_cfg
    data = {key: cfg[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    save_model(path, model.state_dict(), model_config(model, [f"class {i}" for i in range(10)], data, kwargs))
    return f"local-dir:{path}"


@pytest.mark.parametrize(
    ("name", "shape"),
    [("risotto_resnet20", {}), ("risotto_resnet50_cifar", {"layers": (1, 2, 2, 1), "channels": (16, 32, 64, 128)})],
)
def test_onnx_runtime_agrees_on_100_real_images_at_any_batch(name, shape, tmp_path):
    source = folder_of(name, tmp_path / "model", **shape)
    file = tmp_path / "model.onnx"
    model = timm.create_model(source, pretrained=True).eval()
    images = export.photos(View.of({**model.pretrained_cfg, "crop_mode": "center"}), 100)
    assert export.export(source, file) < 1e-4
    with torch.no_grad():
        wanted = model(images).numpy()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for size in (1, 7, 64, 100):
        (logits,) = session.run(None, {"images": images[:size].numpy()})
        assert np.abs(logits - wanted[:size]).max() < 1e-4
    stored = onnx.load(str(file))
    facts = json.loads({entry.key: entry.value for entry in stored.metadata_props}[export.KEY])
    assert facts["mean"] == list(model.pretrained_cfg["mean"]) and facts["labels"][3] == "class 3"
    assert stored.opset_import[0].version == export.OPSET


@pytest.mark.parametrize("suffix", export.SUFFIXES)
@pytest.mark.parametrize("half", [False, True])
def test_every_format_in_both_precisions(suffix, half, tmp_path):
    if suffix == ".onnx" and torch.__version__ < "2.7":
        pytest.skip("torch 2.6 cannot write batch norm as ONNX")
    source = folder_of("risotto_resnet20_bn", tmp_path / "model")
    file = tmp_path / f"small{suffix}"
    assert export.export(source, file, half=half) < export.TOLERANCE[half]
    read = export.load_exported(file)
    assert read.classes == 10 and read.view.input_size == (3, 32, 32)
    images = export.photos(read.view, 3)
    logits = timm.create_model(source, pretrained=True).eval()(images).detach()
    scale = logits.abs().max().item()
    torch.testing.assert_close(read.run(images), logits, atol=scale * export.TOLERANCE[half], rtol=0)
    assert read.run(images[:1]).dtype == torch.float32


def test_evaluate_reads_exported_files_and_compares_models(tmp_path, command, photo_folder):
    source = folder_of("risotto_resnet20", tmp_path / "model")
    state = timm.create_model(source, pretrained=True)
    state.reset_classifier(2)
    cfg = state.pretrained_cfg
    data = {key: cfg[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    save_model(tmp_path / "model", state.state_dict(), model_config(state, ["church", "flower"], data, {}))
    result = command(export.main, source, "--output", tmp_path / "model.onnx", "--data", photo_folder)
    assert result.code == 0 and "largest" in result.out, result
    report, table, figures = tmp_path / "out" / "report.json", tmp_path / "out" / "table.csv", tmp_path / "figures"
    files = ["--json", report, "--csv", table, "--figures", figures]
    result = command(evaluate.main, source, tmp_path / "model.onnx", "--data", photo_folder, "--robustness", *files)
    assert result.code == 0, result
    first, second, comparison = json.loads(report.read_text())
    assert first["top1"] == second["top1"] and first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert comparison["difference"] == 0 and comparison["p"] == 1
    assert {len(values) for values in first["robustness"].values()} == {5} and len(first["robustness"]) == 5
    assert sum(map(sum, first["confusion"])) == first["images"] == 16
    rows = list(csv.DictReader(table.open()))
    assert [row["model"] for row in rows] == [source, str(tmp_path / "model.onnx")]
    assert [float(rows[0]["top1_low"]), float(rows[0]["top1_high"])] == first["top1_interval"]
    assert len(list(figures.glob("*.png"))) == 4
    result = command(evaluate.main, tmp_path / "model.onnx", "--data", photo_folder, "--image-size", 48)
    assert result.code == 2 and "exported for images of 32 px" in result.err
    for option in (["--amp", "bfloat16"], ["--compile"]):
        result = command(evaluate.main, tmp_path / "model.onnx", "--data", photo_folder, *option)
        assert result.code == 2 and "which runs as it is; leave --amp and --compile out" in result.err


def test_what_cannot_be_exported_or_read_is_told(tmp_path, command):
    source = folder_of("risotto_resnet20", tmp_path / "model")
    result = command(export.main, source, "--output", tmp_path / "model.xyz")
    assert result.code == 2 and "named *.onnx" in result.err
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    for name, word in (("broken.onnx", "damaged"), ("missing.pt2", "no such file")):
        result = command(evaluate.main, tmp_path / name, "--data", "digits")
        assert result.code == 2 and word in result.err and "Traceback" not in result.err
    export.export(source, tmp_path / "whole.pt2")
    (tmp_path / "cut.pt2").write_bytes((tmp_path / "whole.pt2").read_bytes()[:50_000])
    result = command(evaluate.main, tmp_path / "cut.pt2", "--data", "digits")
    assert result.code == 2 and result.err.count("\n") == 1 and "cut short" in result.err
    for suffix in ("ts", "pt2"):
        (tmp_path / f".model.new.{suffix}").mkdir()  # where it is written first
        with pytest.raises(UserError, match="cannot be written: Is a directory"):
            export.export(source, tmp_path / f"model.{suffix}")


def test_a_net_whose_logits_are_all_zero_is_exported(tmp_path):
    """As Fixup's are, before it is trained."""
    source = folder_of("risotto_resnet20", tmp_path / "model", init="fixup")
    assert export.export(source, tmp_path / "model.ts") == 0


class Harmful:
    """What runs code when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return exec, (f"open({str(self.trace)!r}, 'w')",)


def test_a_program_that_holds_a_pickle_is_refused_without_running_it(tmp_path):
    export.export(folder_of("risotto_resnet20", tmp_path / "model"), tmp_path / "model.pt2")
    pickled = io.BytesIO()
    torch.save((Harmful(tmp_path / "trace"),), pickled)
    changed = 0
    with zipfile.ZipFile(tmp_path / "model.pt2") as whole, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as evil:
        for entry in whole.infolist():
            replaced = any(word in entry.filename for word in ("sample_inputs", "example_inputs"))  # by torch's version
            changed += replaced
            evil.writestr(entry.filename, pickled.getvalue() if replaced else whole.read(entry))
    assert changed
    with pytest.raises(UserError, match="damaged or was not written"):
        export.load_exported(tmp_path / "evil.pt2")
    assert not (tmp_path / "trace").exists()


def test_what_the_exporter_cannot_do_is_one_message(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise torch.onnx.errors.OnnxExporterError("step 3 of 3\nfailed") from ValueError("node 7 of\nmany")

    monkeypatch.setattr(torch.onnx, "export", fail)
    source = folder_of("risotto_resnet20", tmp_path / "model")
    with pytest.raises(UserError, match=r"cannot write this net as ONNX \(node 7 of\); a newer one may"):
        export.export(source, tmp_path / "model.onnx")
    assert not list(tmp_path.glob("*.onnx"))


def test_a_file_that_disagrees_is_not_written(tmp_path, monkeypatch):
    source = folder_of("risotto_resnet20", tmp_path / "model")
    file = tmp_path / "model.ts"
    export.export(source, file)
    before = file.read_bytes()
    write_net = export.write_net

    def another(model, *args):
        model.fc.bias.data += 0.1
        write_net(model, *args)

    monkeypatch.setattr(export, "write_net", another)
    with pytest.raises(UserError, match="not written"):
        export.export(source, file)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()].count("model.ts") == 1
