"""A model folder: config.json in timm's format and model.safetensors, which `local-dir:` and the Hub both read."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from .files import sha256, write_atomically

_SOURCE_KEYS = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "tag")


def save_model(
    folder: Path, state: dict[str, Tensor], config: dict[str, Any], weights_name: str = "model.safetensors"
) -> str:
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
    if tuple(data_config["input_size"]) != tuple(cfg["input_size"]):
        cfg["pool_size"] = None
        cfg.pop("test_input_size", None)
    cfg.update(data_config, num_classes=len(classes))
    known = PretrainedCfg.__dataclass_fields__
    return {
        "architecture": architecture,
        "num_classes": len(classes),
        "num_features": model.num_features,
        "label_names": classes,
        "model_args": model_args,
        "pretrained_cfg": {key: value for key, value in cfg.items() if key in known},
    }
