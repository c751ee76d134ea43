"""The table of variants: what every net of the zoo is made of, and the cfg it has by itself."""

from typing import Any, NamedTuple

from timm.models import PretrainedCfg

from .blocks import BasicBlock, Bottleneck

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

ORIGIN = {
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "apache-2.0",
    "paper_ids": "arXiv:2210.02411",
    "paper_name": "Dynamical Isometry for Residual Networks",
}


class Variant(NamedTuple):
    """A net of the zoo."""

    doc: str
    net: dict[str, Any]  # arguments of RisottoResNet
    cfg: dict[str, Any]  # timm's default cfg


VARIANTS = {
    f"risotto_{name}{suffix}": Variant(
        f"{name.replace('resnet', 'ResNet-')}: {what}.",
        {"block": block, "layers": layers, "channels": channels, "stem": stem, **options},
        {**ORIGIN, **cfg},
    )
    for name, block, layers, channels, stem, cfg in _NETS
    for suffix, (what, options) in _SUFFIXES.items()
}


def own_cfg(architecture: str) -> dict[str, Any] | None:
    """The cfg that a net of this zoo has by itself, whatever was released of it; None for other nets."""
    return PretrainedCfg(**VARIANTS[architecture].cfg).to_dict() if architecture in VARIANTS else None
