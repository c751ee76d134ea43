"""Residual blocks y = relu(alpha f(x) + h(x)), on timm's blocks and with their module names."""

import torch
from timm.models import resnet as timm_resnet
from torch import Tensor, nn


class _Residual(nn.Module):
    """What both blocks add to timm's: alpha and biases where there is no normalization, and projections everywhere."""

    def _complete(self, inplanes: int, stride: int, normalized: bool, projection: bool, dd: dict) -> None:
        convs = [m for m in self.children() if isinstance(m, nn.Conv2d)]
        if projection and self.downsample is None:
            self.downsample = timm_resnet.downsample_conv(
                inplanes,
                convs[-1].out_channels,
                kernel_size=1,
                stride=stride,
                norm_layer=nn.BatchNorm2d if normalized else nn.Identity,
                **dd,
            )
        self.register_parameter("alpha", None if normalized else nn.Parameter(torch.ones((), **dd)))
        if not normalized:  # the skip needs no bias of its own: the branch's last one is added to the same sum
            for conv in convs:
                conv.bias = nn.Parameter(torch.zeros(conv.out_channels, **dd))

    def _merge(self, branch: Tensor, x: Tensor) -> Tensor:
        if self.drop_path is not None:
            branch = self.drop_path(branch)
        if self.alpha is not None:
            branch = branch * self.alpha
        if self.downsample is not None:
            x = self.downsample(x)
        branch += x
        return branch


class BasicBlock(timm_resnet.BasicBlock, _Residual):
    """f is two 3x3 convolutions. `norm_layer=nn.Identity` makes it a block without normalization: biases and alpha."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        norm_layer: type[nn.Module] = nn.Identity,
        projection: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(inplanes, planes, stride, downsample, norm_layer=norm_layer, **kwargs, **dd)
        self._complete(inplanes, stride, norm_layer is not nn.Identity, projection, dd)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.act2(self._merge(branch, x))


class Bottleneck(timm_resnet.Bottleneck, _Residual):
    """f is a 1x1, a 3x3 and a 1x1 convolution, the inner width a quarter of the outer. See `BasicBlock`."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        norm_layer: type[nn.Module] = nn.Identity,
        projection: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(inplanes, planes, stride, downsample, norm_layer=norm_layer, **kwargs, **dd)
        self._complete(inplanes, stride, norm_layer is not nn.Identity, projection, dd)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act1(self.bn1(self.conv1(x)))
        branch = self.act2(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return self.act3(self._merge(branch, x))
