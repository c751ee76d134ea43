"""Export a trained model: python -m training.export risotto_resnet20.cifar10-jpeg --format onnx

The file takes batches of any size, carries its preprocessing and class names, and is written only if it agrees with
PyTorch on real images. `python -m training.evaluate FILE --data FOLDER` measures it.
"""

import argparse
import contextlib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from timm.data import resolve_data_config
from torch import Tensor, nn

from risotto_zoo.creation import create_model
from risotto_zoo.errors import UserError, exits_cleanly
from risotto_zoo.images import to_mode

from .data import View, load_set, normalized

SUFFIXES = {".onnx": "onnx", ".ts": "torchscript", ".pt2": "torch.export"}
OPSET = 18
KEY = "risotto_zoo.json"  # the name of our metadata inside the file
CHECKED = (1, 7, 64)  # batch sizes
TOLERANCE = {False: 1e-4, True: 2e-2}  # of logits, float32 and float16, relative to the largest


@dataclass(frozen=True)
class Exported:
    """A model read back from a file."""

    run: Callable[[Tensor], Tensor]  # float32 images (B, C, H, W) on the CPU to float32 logits
    view: View
    classes: int
    labels: list[str] | None


def export(name: str, path: Path, half: bool = False, data: str | None = None) -> float:
    """Write a model to a file, in the format that its suffix says, once it agrees with PyTorch.

    Args:
        name: A model with weights, as for `timm.create_model`.
        path: *.onnx, *.ts (TorchScript) or *.pt2 (torch.export).
        half: Weights and arithmetic in float16; inputs and logits stay float32.
        data: Image folder on whose validation images (100 at most) to compare; crops of two photos if None.

    Returns:
        The largest difference of a logit from PyTorch's in float32, relative to the largest logit.

    Raises:
        UserError: If the model or the images cannot be had, the format's package is missing, the file cannot be
            written, or the difference is above tolerance: nothing is written then.
    """
    model = create_model(name, pretrained=True).eval()
    view = View.of(resolve_data_config(model=model, use_test_size=True, verbose=False))
    if data is None:
        images = photos(view, max(CHECKED))
    else:
        held = load_set(data, False, view)
        images = normalized(held.images[torch.linspace(0, len(held) - 1, min(100, len(held))).long()], view)
    labels = model.pretrained_cfg.get("label_names")
    facts = {"model": name, "classes": model.num_classes, "labels": list(labels) if labels else None, **asdict(view)}
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in images.split(64)])
    net = _Half(model).eval() if half else model
    temporary = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_net(net, images, temporary, facts)
        difference = _difference(load_exported(temporary).run, images, wanted)
        if not difference <= TOLERANCE[half]:
            raise UserError(
                f"{path} is not written: its logits are off by {difference:.1e} of the largest, more than "
                f"{TOLERANCE[half]:.0e}"
            )
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # what kept it from being written may keep it from being removed
            temporary.unlink()
    return difference


def write_net(net: nn.Module, images: Tensor, path: Path, facts: dict[str, Any]) -> None:
    """Write a net in the format of the path's suffix, unchecked.

    Args:
        net: In evaluation mode.
        images: Two images or more to trace it with, shape (N, C, H, W).
        path: *.onnx, *.ts or *.pt2.
        facts: The metadata that `load_exported` reads: classes, labels and the fields of a View.
    """
    _WRITERS[_format(path)](net, images, path, json.dumps(facts))


def load_exported(path: Path) -> Exported:
    """Read a file that `export` has written.

    Raises:
        UserError: If it is missing, broken, or not one of ours.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        run, text = _READERS[_format(path)](path)
        facts = json.loads(text)
        view = View(**{key: _tuple(facts[key]) for key in View.__dataclass_fields__})
    except UserError:
        raise
    except Exception as error:  # three runtimes, each with errors of its own
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"{path} is damaged or was not written by training.export ({reason})") from None
    return Exported(run, view, facts["classes"], facts["labels"])


def photos(view: View, count: int) -> Tensor:
    """Crops of scikit-learn's two sample photos, normalized as the model wants them, shape (count, C, H, W)."""
    from PIL import Image

    draw, side = np.random.default_rng(0), view.input_size[1]
    sources = [Image.fromarray(photo) for photo in load_sample_images().images]
    crops = []
    for i in range(count):
        photo = sources[i % 2]
        left, top = draw.integers(0, photo.width - 256), draw.integers(0, photo.height - 256)
        crop = photo.crop((left, top, left + 256, top + 256)).resize((side, side))
        crops.append(torch.from_numpy(np.array(to_mode(crop, view.input_size[0]))).reshape(side, side, -1))
    return normalized(torch.stack(crops).permute(0, 3, 1, 2), view)


class _Half(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.half()).float()


def _difference(run: Callable[[Tensor], Tensor], images: Tensor, wanted: Tensor) -> float:
    scale = wanted.abs().max().item() or 1.0
    worst = 0.0
    for size in (*CHECKED, len(images)):
        part = images[:size]
        worst = max(worst, (run(part) - wanted[: len(part)]).abs().max().item() / scale)
    return worst


def _format(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in SUFFIXES.items())
        raise UserError(f"{path}: the suffix says the format; use {known}")
    return SUFFIXES[path.suffix]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _needs(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{package} is not installed; in a checkout, pip install -e '.[export]'") from None


def _write_onnx(net: nn.Module, images: Tensor, path: Path, facts: str) -> None:
    onnx = _needs("onnx")
    _needs("onnxscript")
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                net,
                (images[:2],),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: batch},),
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:  # torch 2.6 of a net with batch norm
            reason = str(error.__cause__ or error).split("\n")[0][:120]
            raise UserError(
                f"torch {torch.__version__} cannot write this net as ONNX ({reason}); a newer one may, or take "
                "--format torchscript"
            ) from None
    program.save(str(path))
    model = onnx.load(str(path))
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, facts
    onnx.save(model, str(path))


def _read_onnx(path: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    runtime = _needs("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map[KEY]
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0]), facts


def _write_torchscript(net: nn.Module, images: Tensor, path: Path, facts: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = io.BytesIO()  # torch's own writer does not say what the system says
        torch.jit.save(torch.jit.script(net), file, _extra_files={KEY: facts})
    path.write_bytes(file.getvalue())


def _read_torchscript(path: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    extra = {KEY: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    return torch.no_grad()(net), _text(extra[KEY])


def _write_program(net: nn.Module, images: Tensor, path: Path, facts: str) -> None:
    program = torch.export.export(net, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={KEY: facts})
    path.write_bytes(file.getvalue())


def _read_program(path: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is cut short or no such file")
    extra = {KEY: ""}
    # torch keeps tensors in such a file as pickles and would, where one is no plain tensor, run what it says.
    with patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}):
        program = torch.export.load(str(path), extra_files=extra)
    return torch.no_grad()(program.module()), _text(extra[KEY])


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


_WRITERS = {"onnx": _write_onnx, "torchscript": _write_torchscript, "torch.export": _write_program}
_READERS = {"onnx": _read_onnx, "torchscript": _read_torchscript, "torch.export": _read_program}


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="a model with weights, local-dir:FOLDER or hf-hub:ORG/NAME")
    parser.add_argument("--format", choices=list(SUFFIXES.values()), default="onnx", help="default: onnx")
    parser.add_argument("--output", type=Path, help="the file (default: NAME.onnx, .ts or .pt2)")
    parser.add_argument("--half", action="store_true", help="float16 inside; inputs and logits stay float32")
    parser.add_argument("--data", help="compare on 100 validation images of this folder (default: crops of two photos)")
    args = parser.parse_args()
    suffix = next(suffix for suffix, name in SUFFIXES.items() if name == args.format)
    path = args.output or Path(args.name.replace(":", "_").replace("/", "_") + suffix)
    if path.suffix != suffix:
        raise UserError(f"--output {path}: a {args.format} file is named *{suffix}")
    difference = export(args.name, path, args.half, args.data)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, batches of any size; largest difference of a logit")
    print(f"from PyTorch, relative to the largest: {difference:.1e}")


if __name__ == "__main__":
    main()
