"""What an initializer needs to know of a ResNet, read off by the block and attribute names of timm and torchvision.

Whatever an exact initialization cannot handle is refused here, before any weight has changed; but for the max pool of a
standard stem, which nets with batch normalization keep.
"""

import math
import numbers
from dataclasses import dataclass

import torch
from torch import nn

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity)
# Not part of the function at evaluation time, or not part of the block's arithmetic at all.
_NEUTRAL = ("drop_block", "drop_path")


@dataclass
class Block:
    """One residual block y = relu(gain * f(x) + h(x)), f a chain of convolutions with ReLUs between them."""

    name: str
    convs: list[nn.Conv2d]  # of the branch f, in order
    skip: nn.Conv2d | None  # h; None where the skip adds x itself
    gain: nn.Parameter | None  # multiplier of the branch: alpha, or the last normalization's weight; None if neither
    biases: nn.Parameter | None  # Fixup's scalars, where the net was built with them


@dataclass
class ResNetStructure:
    """The layers of a ResNet in the order of the forward pass."""

    stem: list[nn.Conv2d]
    blocks: list[Block]
    head: nn.Linear | None
    norms: list[nn.Module]  # every batch normalization

    @property
    def convs(self) -> list[nn.Conv2d]:
        """Every convolution, in the order of the forward pass."""
        convs = list(self.stem)
        for block in self.blocks:
            convs += block.convs + ([block.skip] if block.skip is not None else [])
        return convs

    @property
    def layers(self) -> list[nn.Conv2d | nn.Linear]:
        """Every convolution, and the head if there is one."""
        return self.convs + ([self.head] if self.head is not None else [])

    def reset(self, alpha: float) -> None:
        """Fresh normalizations, gains of alpha, Fixup's scalars at 0: all that is no layer."""
        for norm in self.norms:
            norm.reset_parameters()
        for block in self.blocks:
            if block.gain is not None:
                block.gain.fill_(alpha)
            if block.biases is not None:
                block.biases.zero_()


def resnet_structure(model: nn.Module) -> ResNetStructure:
    """Read the layers of a timm or torchvision ResNet, or of one of this package.

    Raises:
        ValueError: for anything that is not a plain ReLU ResNet of even widths with ungrouped, centred convolutions
            and batch normalization or none; the message names the module and the reason.
    """
    if not isinstance(getattr(model, "layer1", None), nn.Sequential) or not hasattr(model, "conv1"):
        raise ValueError(f"{type(model).__name__} is not a ResNet: it has no 'conv1' and 'layer1' as timm's has")
    structure = ResNetStructure(stem=_stem_convs(model), blocks=[], head=_head(model), norms=[])
    for stage in _stage_names(model):
        for index, block in enumerate(getattr(model, stage)):
            structure.blocks.append(_read_block(f"{stage}.{index}", block))
    if not structure.blocks:
        raise ValueError(f"{type(model).__name__} has no residual blocks in layer1, layer2, ...")
    structure.norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    names, layers = {module: name for name, module in model.named_modules()}, structure.layers
    known = set(layers)
    for module, name in names.items():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and module not in known:
            raise ValueError(f"{name}: a {type(module).__name__} outside stem, blocks and 'fc' is no part of a ResNet")
    seen: set[int] = set()
    for layer in layers:
        name = names[layer]
        if "weight" not in layer._parameters:
            raise ValueError(f"{name}: its weight is computed from others, by pruning or normalizing it, say")
        if id(layer.weight) in seen:
            raise ValueError(f"{name}: its weight is that of another layer, too")
        seen.add(id(layer.weight))
    return structure


def check_alpha(alpha: float) -> None:
    """Refuse what is no finite number."""
    if not isinstance(alpha, numbers.Real) or not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha!r}, not a finite number")


def check_arguments(structure: ResNetStructure, alpha: float, generator: torch.Generator | None) -> None:
    """Refuse an alpha that is not finite or that a block has no multiplier to hold, and a generator on a device."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator is {generator!r}, not a torch.Generator")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"the generator is on {generator.device}; only a CPU generator gives the same weights anywhere"
        )
    check_alpha(alpha)
    for block in structure.blocks:
        if block.gain is None and alpha != 1:
            raise ValueError(f"{block.name}: has neither an alpha nor a normalization weight to hold alpha={alpha}")
        if block.gain is not None and abs(alpha) > torch.finfo(block.gain.dtype).max:
            raise ValueError(f"{block.name}: {block.gain.dtype} cannot hold alpha={alpha}")


def _stage_names(model: nn.Module) -> list[str]:
    return [name for name in (f"layer{i}" for i in range(1, 10)) if hasattr(model, name)]


def _stem_convs(model: nn.Module) -> list[nn.Conv2d]:
    known = (nn.Conv2d, nn.Sequential, nn.ReLU, nn.MaxPool2d, *_NORMS)
    convs, bare, last = [], set(), ""
    for part in ("conv1", "bn1", "act1", "relu", "maxpool"):
        for name, module in getattr(model, part, nn.Identity()).named_modules(prefix=part, remove_duplicate=False):
            if type(module) not in known:
                raise ValueError(f"{name}: a {type(module).__name__} in the stem cannot be initialized exactly")
            if isinstance(module, nn.Conv2d):
                _check_conv(name, module, input_pairs=bool(convs))
                convs.append(module)
                bare.add(last := name)
            elif isinstance(module, nn.ReLU):
                bare.discard(last)
    if bare:
        raise ValueError(f"{min(bare)}: no ReLU follows this convolution of the stem")
    return convs


def _head(model: nn.Module) -> nn.Linear | None:
    head = getattr(model, "fc", None)
    if head is None or isinstance(head, nn.Identity):
        return None
    if not isinstance(head, nn.Linear):
        raise ValueError(f"fc: the head is a {type(head).__name__}, not a linear layer")
    return head


def _read_block(name: str, block: nn.Module) -> Block:
    depth = 3 if hasattr(block, "conv3") else 2
    branch = {f"{part}{i + 1}" for part in ("conv", "bn") for i in range(depth)}
    for child_name, child in block.named_children():
        full = f"{name}.{child_name}"
        if child_name in _NEUTRAL or child_name == "downsample":
            continue
        if child_name in ("aa", "se"):
            if not isinstance(child, nn.Identity):
                what = "anti-aliasing" if child_name == "aa" else "channel attention"
                raise ValueError(f"{full}: {what} ({type(child).__name__}) has no exact initialization")
        elif child_name.startswith(("act", "relu")):
            if not isinstance(child, nn.ReLU):
                raise ValueError(f"{full}: the activation is a {type(child).__name__}, not a ReLU")
        elif child_name not in branch:
            raise ValueError(f"{full}: a {type(child).__name__} is not part of a plain residual block")
        elif child_name.startswith("bn") and type(child) not in _NORMS:
            raise ValueError(f"{full}: {type(child).__name__} is not batch normalization")
    missing = sorted(b for b in branch if not hasattr(block, b))
    if missing:
        raise ValueError(f"{name}: a {type(block).__name__} has no {', '.join(missing)}, so it is no residual block")

    convs = [getattr(block, f"conv{i + 1}") for i in range(depth)]
    for i, conv in enumerate(convs):
        _check_conv(f"{name}.conv{i + 1}", conv)
    skip = _skip_conv(f"{name}.downsample", getattr(block, "downsample", None))
    branch_stride = tuple(map(math.prod, zip(*(conv.stride for conv in convs), strict=True)))
    if branch_stride != (skip.stride if skip is not None else (1, 1)):
        raise ValueError(f"{name}: branch and skip have different strides, so they do not read the same pixels")
    if skip is None and convs[0].in_channels != convs[-1].out_channels:
        raise ValueError(f"{name}: an identity skip cannot change the number of channels")
    gain = getattr(block, "alpha", None)
    if gain is None:
        gain = getattr(getattr(block, f"bn{depth}"), "weight", None)
    return Block(name, convs, skip, gain, getattr(block, "biases", None))


def _skip_conv(name: str, downsample: nn.Module | None) -> nn.Conv2d | None:
    if downsample is None:
        return None
    parts = list(downsample.children()) if isinstance(downsample, nn.Sequential) else [downsample]
    convs = [part for part in parts if isinstance(part, nn.Conv2d)]
    others = [part for part in parts if not isinstance(part, nn.Conv2d) and type(part) not in _NORMS]
    if others:
        raise ValueError(f"{name}: a {type(others[0]).__name__} in the skip averages or moves pixels, no isometry does")
    if len(convs) != 1:
        raise ValueError(f"{name}: the skip has {len(convs)} convolutions, not one")
    _check_conv(name, convs[0])
    return convs[0]


def _check_conv(name: str, conv: nn.Module, input_pairs: bool = True) -> None:
    if type(conv) is not nn.Conv2d and not getattr(conv, "plain", False):
        raise ValueError(f"{name}: a {type(conv).__name__} stands where a plain convolution is expected")
    if conv.groups != 1:
        raise ValueError(f"{name}: grouped convolution (groups={conv.groups}) cannot hold a looks-linear matrix")
    for side, channels in (("output", conv.out_channels), ("input", conv.in_channels if input_pairs else 0)):
        if channels % 2:
            raise ValueError(f"{name}: {channels} {side} channels cannot be paired, an even number is needed")
    centred = tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    if tuple(conv.padding if not isinstance(conv.padding, str) else ()) != centred:
        raise ValueError(f"{name}: padding is {conv.padding!r}; {centred} is needed, which centres the kernel")
