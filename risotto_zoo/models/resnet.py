"""The ResNet of the zoo: timm's, with any number of stages, with or without normalization, exactly initialized."""

import numbers
from typing import Any, Literal

import torch
from timm.layers import create_classifier
from timm.models import resnet as timm_resnet
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from risotto_zoo.errors import did_you_mean
from risotto_zoo.initializers import SCHEMES, risotto_head_
from risotto_zoo.initializers.risotto import check_options
from risotto_zoo.initializers.structure import check_alpha

from .blocks import BasicBlock, Bottleneck

OF_THE_START = {"init", "alpha", "rotated_pairs", "patches", "seed"}
"""Arguments of a net that weights which are loaded make void."""


class RisottoResNet(timm_resnet.ResNet):
    """timm's ResNet without its normalization: convolution biases and one trainable alpha per block instead.

    Module names, feature interface and head are timm's. With `norm='batch'` and the ImageNet stem the state dict is
    that of timm's plain resnets.

    Args:
        block: BasicBlock or Bottleneck of this package.
        layers: Number of blocks of each stage.
        channels: Width of each stage, at most four, as many as `layers`.
        stem: 'imagenet' is 7x7 with stride 2 and then a max pool (with batch norm) or a 3x3 stride-2 convolution
            (without, since a max pool is no isometry); 'cifar' is 3x3 with stride 1 and as wide as the first stage.
        norm: 'none' or 'batch'.
        skip: 'identity' where shapes allow (the paper's type B), or 'projection' in every block (type C).
        num_classes, in_chans, global_pool, output_stride, drop_rate, drop_path_rate, device, dtype: as in timm.
        init: Initialization scheme, a key of `risotto_zoo.initializers.SCHEMES`; None leaves the weights undefined, for
            loading a checkpoint (the constructor's alone: `timm.create_model` drops arguments that are None).
        alpha: Weight of every residual branch at the start; the scheme's own (1, or 0 for SkipInit and ReZero) if None.
        rotated_pairs: RISOTTO alone: how many pairs of channels a block with an identity skip rotates; all if None.
        patches: RISOTTO alone: strided layers read every pixel, not one of each s x s.
        seed: Seed of the initialization; the global generator is used if None.

    Raises:
        ValueError: If `init` is unknown or cannot initialize this net with this alpha, or an argument is out of range.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        channels: tuple[int, ...] = (64, 128, 256, 512),
        stem: Literal["imagenet", "cifar"] = "imagenet",
        norm: Literal["none", "batch"] = "none",
        skip: Literal["identity", "projection"] = "identity",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init: str | None = "risotto",
        alpha: float | None = None,
        rotated_pairs: int | None = None,
        patches: bool = False,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not timm's constructor: its stem is 64 wide and it draws weights to be overwritten
        check_choice("norm", norm, ("none", "batch"))
        check_choice("skip", skip, ("identity", "projection"))
        check_choice("stem", stem, ("imagenet", "cifar"))
        check_start(init, alpha, rotated_pairs, patches, seed)
        for key, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not isinstance(rate, numbers.Real) or not 0 <= rate < 1:
                raise ValueError(f"{key} is {rate!r}, not a number from 0 to below 1")
        check_choice("output_stride", output_stride, (8, 16, 32) if stem == "imagenet" else (1, 2, 4, 8, 16, 32))
        if not 0 < len(layers) == len(channels) <= 4 or layers[-1] < 1 or sum(layers) < 2:
            raise ValueError(
                f"layers {tuple(layers)} and channels {tuple(channels)}: one number each for every stage is needed, "
                "for one to four stages, with at least one block in the last and two in all"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.init, self.alpha_init, self.seed = init, alpha, seed
        self.rotated_pairs, self.patches = rotated_pairs, patches

        # Parameters are allocated once and written once: everything is built without storage, then initialized.
        # Modules are registered in the order of the forward pass, which timm's feature extraction relies on.
        meta = {"device": "meta", "dtype": dtype}
        norm_layer = nn.BatchNorm2d if norm == "batch" else nn.Identity
        bias = norm == "none"
        width = 64 if stem == "imagenet" else channels[0]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=bias, **meta)
        else:
            self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=bias, **meta)
        self.bn1 = norm_layer(width, **meta)
        self.act1 = nn.ReLU(inplace=True)
        if stem == "cifar":
            self.maxpool = nn.Identity()
        elif norm == "batch":
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.maxpool = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1, **meta), nn.ReLU(inplace=True))

        # timm counts strides from its own stem, which divides by 4.
        extra = 1 if stem == "imagenet" else 4
        stages, feature_info = timm_resnet.make_blocks(
            (block,) * len(layers),
            channels,
            layers,
            width,
            output_stride=output_stride * extra,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer,
            projection=skip == "projection",
            scalar_biases=init == "fixup" and norm == "none",
            **meta,
        )
        for info in feature_info:
            info["reduction"] //= extra
        self.feature_info = [
            {"num_chs": width, "reduction": 2 if stem == "imagenet" else 1, "module": "act1"},
            *feature_info,
        ]
        # forward_features of timm runs four stages; those that a net does not have are empty.
        empty = [(f"layer{i}", nn.Sequential()) for i in range(len(stages) + 1, 5)]
        for name, stage in stages + empty:
            self.add_module(name, stage)
        self.num_features = channels[-1] * block.expansion
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **meta)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

        self.to_empty(device=device if device is not None else torch.get_default_device())
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize all weights by the scheme and its arguments that the net was made with."""
        if self.conv1.weight.is_meta or self.init is None:
            return
        generator = None if self.seed is None else torch.Generator().manual_seed(int(self.seed))
        more = {"rotated_pairs": self.rotated_pairs, "patches": self.patches} if self.init == "risotto" else {}
        SCHEMES[self.init](self, self.alpha_init, generator, **more)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, as in timm; the new one is semi-orthogonal on the signal (RISOTTO's head)."""
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        like = {"device": self.conv1.weight.device, "dtype": self.conv1.weight.dtype}
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool, **like)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)
        if num_classes > 0:
            risotto_head_(self.fc, self.num_features)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features and the maps listed in `feature_info`, as in timm, for any number of stages.

        Args:
            x: Images, shape (B, in_chans, H, W).
            indices: The last n maps if int, all if None, else the indices into `feature_info`.
            norm: Unused; there is no final normalization.
            stop_early: Do not run the stages behind the last map asked for.
            output_fmt: Only 'NCHW'.
            intermediates_only: Return the list of maps alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        x = self.act1(self.bn1(self.conv1(x)))
        maps = [x] if 0 in take else []
        x = self.maxpool(x)
        for i, info in enumerate(self.feature_info[1:], start=1):
            if stop_early and i > last:
                break
            stage = getattr(self, info["module"])
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages (and the head) that the maps at `indices` do not need, as in timm; returns the indices."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        pruned = self.feature_info[last + 1 :]
        for info in pruned:
            setattr(self, info["module"], nn.Sequential())
        if last == 0:
            self.maxpool = nn.Identity()
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return take


def check_start(
    init: str | None = "risotto",
    alpha: float | None = None,
    rotated_pairs: int | None = None,
    patches: bool = False,
    seed: int | None = None,
) -> None:
    """Refuse what is no start of any net, also where weights are about to replace it.

    Raises:
        ValueError: For an unknown scheme, values out of range, or options that are another scheme's.
    """
    check_choice("init", init, (*SCHEMES, None))
    if alpha is not None:
        check_alpha(alpha)
    check_options(rotated_pairs, patches)
    for key, given in (("rotated_pairs", rotated_pairs is not None), ("patches", patches)):
        if given and init not in ("risotto", None):
            raise ValueError(
                f"{key} is of init='risotto', not of {init!r}; leave it out, or, if a saved model brings it, take "
                "the net by its architecture's name"
            )
    if seed is not None and not (isinstance(seed, numbers.Integral) and -(2**63) <= seed < 2**64):
        raise ValueError(f"seed is {seed!r}, not a whole number from -2**63 to 2**64 - 1")


def check_choice(argument: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse a value that is not among the choices by a ValueError that names the nearest."""
    if value not in choices:
        hint = did_you_mean(str(value), [str(choice) for choice in choices if choice is not None], count=1)
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, choices))}, not {value!r}{hint}")
