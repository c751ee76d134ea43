"""A model folder: config.json in timm's format and model.safetensors, which `local-dir:` and the Hub both read."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from .errors import UserError
from .files import git_sha1, sha256, write_atomically

WEIGHTS = "model.safetensors"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)  # the last: batch norm's counter
_SOURCE_KEYS = (
    "url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "tag", "label_offset", "custom_load",
)  # fmt: skip


def save_model(folder: Path, state: dict[str, Tensor], config: dict[str, Any], weights_name: str = WEIGHTS) -> str:
    """Write the weights and the configuration of a model, each atomically; returns the weights' sha256.

    Args:
        folder: Created if missing.
        state: State dict of the model, on any device.
        config: As `model_config` makes it.
        weights_name: The file of the weights.

    Raises:
        OSError: If the folder cannot be written; files that were there before stay whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomically(folder / weights_name, data)
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    return sha256(data)


def model_config(
    model: nn.Module, classes: list[str], data_config: dict[str, Any], model_args: dict[str, Any]
) -> dict[str, Any]:
    """timm's config.json for a timm model.

    Args:
        model: Made by `timm.create_model`.
        classes: Label names in the order of the logits.
        data_config: input_size, mean, std, interpolation, crop_pct and crop_mode of the model's inputs.
        model_args: Arguments of `timm.create_model` that the weights need.
    """
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in _SOURCE_KEYS}
    architecture = cfg.pop("architecture")
    told = cfg.pop("label_descriptions", None) or {}  # those of the weights it began with, perhaps
    if tuple(data_config["input_size"]) != tuple(cfg["input_size"]) and cfg.get("pool_size") is not None:
        reduction = model.feature_info[-1]["reduction"]
        cfg["pool_size"] = [-(-side // reduction) for side in data_config["input_size"][1:]]
    for key in ("test_input_size", "test_crop_pct"):  # of the weights it began with: these were judged on input_size
        cfg.pop(key, None)
    cfg.update(data_config, num_classes=len(classes), label_names=classes)
    known = PretrainedCfg.__dataclass_fields__
    return {
        "architecture": architecture,
        "num_classes": len(classes),
        "num_features": model.num_features,
        "label_names": classes,
        **({"label_descriptions": {name: told[name] for name in classes}} if told.keys() >= set(classes) else {}),
        "model_args": model_args,
        "pretrained_cfg": {key: value for key, value in cfg.items() if key in known},
    }


def read_verified(path: Path, digest: str | None = None, size: int | None = None) -> bytes:
    """The bytes of a file, once its size and hash are known to be right.

    Args:
        path: The file.
        digest: Its sha256, or (40 digits) its git blob hash, by which the Hub names small files; None skips the check.
        size: Its length in bytes; None skips the check.

    Raises:
        UserError: If the file is missing or is not the one described.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if size is not None and len(data) != size:
        raise UserError(f"{path} has {len(data)} bytes, not {size}: it is truncated or another file; fetch it again")
    if digest is not None:
        found = git_sha1(data) if len(digest) == 40 else sha256(data)
        if found != digest:
            raise UserError(
                f"{path} is damaged or was changed: its hash is {found[:12]}..., not {digest[:12]}...; fetch it again"
            )
    return data


def read_tensors(data: bytes, source: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in float32 if they were stored in half precision; `source` is for messages.

    Raises:
        UserError: If it is no safetensors file, or holds a value that is not finite.
    """
    try:
        state = safetensors.torch.load(data)
    except Exception as error:  # safetensors raises its own kind, and ValueError or KeyError on odd headers
        reason = str(error).split("\n")[0]
        raise UserError(f"{source} is not a whole safetensors file ({reason}); fetch it again") from None
    for name, value in state.items():
        if value.dtype not in _DTYPES:
            raise UserError(
                f"{source}: the tensor {name} is {str(value.dtype).removeprefix('torch.')}, no kind of weight"
            )
        if value.is_floating_point():
            if value.dtype in (torch.float16, torch.bfloat16):
                state[name] = value = value.float()
            # A finite sum has finite terms, and a sum is cheap; an infinite one may be an overflow, so look again.
            if not value.sum().isfinite() and not value.isfinite().all():
                raise UserError(f"{source}: the tensor {name} holds values that are not finite")
    return state


def check_state(
    state: dict[str, Tensor], model: nn.Module, config: dict[str, Any], source: str, shaped_by: Iterable[str] = ()
) -> None:
    """Compare names and shapes of loaded tensors with those of the model they are for.

    The classifier is as wide as `config` says (none for no classes) and the stem reads as many channels, even where
    the model was made with other numbers (timm adapts both later); everything else has the model's own shapes.

    Args:
        state: Tensors by name.
        model: The net that they are about to be loaded into.
        config: timm's pretrained cfg of the weights.
        source: What messages call them.
        shaped_by: Arguments that the model was made with and the weights may not fit, for messages.

    Raises:
        UserError: Naming the first tensor that is missing, left over or of another shape.
    """
    name = config["architecture"]
    own = model.state_dict()
    expected = {key: tuple(value.shape) for key, value in own.items()}
    channels, classes = config["input_size"][0], config["num_classes"]
    if classes < 0:  # timm's scripts ask in this way for a head to be adapted, whatever the file's is
        bias = state.get(f"{config.get('classifier') or 'fc'}.bias")
        classes = 0 if bias is None else len(bias)
    modules = dict(model.named_modules())
    for key, kinds in (("first_conv", nn.Conv2d), ("classifier", (nn.Linear, nn.Identity))):
        if config.get(key) and not isinstance(modules.get(str(config[key])), kinds):
            raise UserError(f"{source}: its configuration calls {config[key]!r} the {key}, which {name} does not have")
    if config.get("first_conv"):
        stem = f"{config['first_conv']}.weight"
        expected[stem] = (expected[stem][0], channels, *expected[stem][2:])
    for part, shape in (("weight", (classes, model.head_hidden_size)), ("bias", (classes,))):
        key = f"{config.get('classifier') or 'fc'}.{part}"
        if classes == 0:
            expected.pop(key, None)
        elif model.num_classes == classes or key not in state:
            expected[key] = shape
        else:  # timm drops it, so it may be one for another pooling
            expected[key] = (classes, *state[key].shape[1:])
    mend = "the file belongs to another architecture or was changed"
    if shaped_by:
        mend += f", or it was made for another {' and '.join(sorted(shaped_by))}, which create_model was given"
    for key, shape in expected.items():
        if key not in state:
            raise UserError(f"{source} lacks the tensor {key} of {name}: {mend}")
        if tuple(state[key].shape) != shape:
            raise UserError(f"{source}: {key} has shape {tuple(state[key].shape)}, but {name} needs {shape}: {mend}")
        if key in own and state[key].is_floating_point() != own[key].is_floating_point():
            raise UserError(f"{source}: {key} is {state[key].dtype}, but {name} needs {own[key].dtype}: {mend}")
    surplus = state.keys() - expected.keys()
    if surplus:
        raise UserError(f"{source} holds a tensor {min(surplus)} that {name} does not have: {mend}")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        UserError: If it is missing, damaged or not in timm's format.
    """
    path = folder / "config.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{folder} is no model folder: {path}: {error.strerror}") from None
    return parse_config(data, str(path))


def parse_config(data: bytes, source: str) -> dict[str, Any]:
    """The content of a config.json; `source` is for messages.

    Raises:
        UserError: If it is damaged or not in timm's format.
    """
    try:
        config = json.loads(data)
    except ValueError:
        raise UserError(f"{source} is damaged: not valid JSON") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise UserError(f"{source} names no architecture; it is not in timm's format")
    for key in ("pretrained_cfg", "model_args"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"{source}: its {key} is no table of keys and values; it is not in timm's format")
    return config


def folder_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder, verified against the hash in its results.json if it has one.

    Raises:
        UserError: If there is no model.safetensors (other formats are not read), or it is not whole.
    """
    path = folder / WEIGHTS
    if not path.exists():
        raise UserError(
            f"{folder} holds no {WEIGHTS}, and other formats are not read; timm's save_for_hf "
            "writes it with safe_serialization=True"
        )
    if not (folder / "results.json").is_file():  # a run that is not finished
        return read_tensors(read_verified(path), str(path))
    try:
        results = json.loads((folder / "results.json").read_bytes())
        digest, size = results["sha256"][WEIGHTS], results.get("bytes")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        digest, size = None, None
    if not isinstance(digest, str) or len(digest) != 64 or not isinstance(size, (int, type(None))):
        raise UserError(f"{folder / 'results.json'} does not give the sha256 of {WEIGHTS}, so it cannot be verified")
    return read_tensors(read_verified(path, digest, size), str(path))
