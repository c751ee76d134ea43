"""The table of registered variants. Importing this module registers every one of them with timm."""

import sys
from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .blocks import BasicBlock, Bottleneck
from .resnet import RisottoResNet

__all__: list[str] = []  # register_model adds every entry point

_IMAGENET = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
}
_CIFAR = {  # mean and deviation: those of the training images of cifar10-jpeg
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.4913, 0.4821, 0.4465),
    "std": (0.2452, 0.2428, 0.2606),
}
_CIFAR4 = {**_CIFAR, "pool_size": (4, 4)}

# name, block, blocks per stage, channels per stage, stem, data configuration
_NETS = [
    ("resnet18", BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), "imagenet", _IMAGENET),
    ("resnet34", BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512), "imagenet", _IMAGENET),
    ("resnet50", Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), "imagenet", _IMAGENET),
    ("resnet101", Bottleneck, (3, 4, 23, 3), (64, 128, 256, 512), "imagenet", _IMAGENET),
    ("resnet152", Bottleneck, (3, 8, 36, 3), (64, 128, 256, 512), "imagenet", _IMAGENET),
    ("resnet20", BasicBlock, (3, 3, 3), (16, 32, 64), "cifar", _CIFAR),
    ("resnet32", BasicBlock, (5, 5, 5), (16, 32, 64), "cifar", _CIFAR),
    ("resnet44", BasicBlock, (7, 7, 7), (16, 32, 64), "cifar", _CIFAR),
    ("resnet56", BasicBlock, (9, 9, 9), (16, 32, 64), "cifar", _CIFAR),
    ("resnet110", BasicBlock, (18, 18, 18), (16, 32, 64), "cifar", _CIFAR),
    ("resnet18_cifar", BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), "cifar", _CIFAR4),
    ("resnet50_cifar", Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), "cifar", _CIFAR4),
]

_SUFFIXES = {
    "": ("no normalization, identity skips where shapes allow", {}),
    "_c": ("no normalization, every skip a 1x1 projection (type C)", {"skip": "projection"}),
    "_bn": ("batch normalization, identity skips where shapes allow", {"norm": "batch"}),
}

_ORIGIN = {
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "apache-2.0",
    "paper_ids": "arXiv:2210.02411",
    "paper_name": "Dynamical Isometry for Residual Networks",
}

default_cfgs = generate_default_cfgs(
    {f"risotto_{name}{suffix}": {**_ORIGIN, **cfg} for name, *_, cfg in _NETS for suffix in _SUFFIXES}
)


def _entry_point(name: str, doc: str, **net: Any) -> Callable[..., RisottoResNet]:
    """A timm entry point that builds `net`; arguments of the caller go before those of the table."""

    def create(pretrained: bool = False, **kwargs: Any) -> RisottoResNet:
        out_indices = tuple(range(len(net["layers"]) + 1))
        return build_model_with_cfg(
            RisottoResNet, name, pretrained, feature_cfg={"out_indices": out_indices}, **{**net, **kwargs}
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = doc
    create.__module__ = __name__
    setattr(sys.modules[__name__], name, create)
    return register_model(create)


for _name, _block, _layers, _channels, _stem, _cfg in _NETS:
    for _suffix, (_what, _options) in _SUFFIXES.items():
        _entry_point(
            f"risotto_{_name}{_suffix}",
            f"{_name.replace('resnet', 'ResNet-')}: {_what}.",
            block=_block,
            layers=_layers,
            channels=_channels,
            stem=_stem,
            **_options,
        )
