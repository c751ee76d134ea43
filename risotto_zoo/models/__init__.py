"""The networks of the zoo; importing this package registers them with timm."""

from pathlib import Path
from typing import Any

import timm
from torch import nn

from risotto_zoo.errors import UserError, did_you_mean

from . import variants
from .blocks import BasicBlock, Bottleneck
from .resnet import RisottoResNet

__all__ = ["BasicBlock", "Bottleneck", "RisottoResNet", "create_model", "variants"]


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model` for commands: what timm refuses becomes one line that names the mend.

    Raises:
        UserError: For an unknown model (naming the nearest), arguments it does not take, or weights it cannot load.
    """
    try:
        source, architecture = timm.models.parse_model_name(name)
    except ValueError as error:
        raise UserError(str(error)) from None
    if source is None and not timm.is_model(architecture.split(".")[0]):
        raise UserError(f"unknown model {name!r}{did_you_mean(name, timm.list_models())}")
    if source == "local-dir" and pretrained and not (Path(architecture) / "model.safetensors").is_file():
        raise UserError(f"model {name}: the folder holds no model.safetensors; other formats are not read")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # the net, timm, safetensors and the Hub's client each raise their own kinds
        reason = str(error).split("\n")[0].replace("RisottoResNet.__init__() got", "the model got")
        raise UserError(f"model {name}: {reason or type(error).__name__}") from None
