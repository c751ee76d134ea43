"""Residual blocks y = relu(alpha f(x) + h(x)), on timm's blocks and with their module names."""

from typing import Any

import torch
from timm.models import resnet as timm_resnet
from torch import Tensor, nn


class ScaledConv2d(nn.Conv2d):
    """A convolution, times a scalar if there is one.

    In training the scalar goes into the kernel, which is small: on the feature map it would cost a pass forward and two
    backward. In evaluation it stays outside, since for a single image it is the kernel that is large.
    """

    plain = True  # without a scale it is nn.Conv2d to the letter: initializers may fill it

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is None:
            return self._conv_forward(x, self.weight, self.bias)
        if not self.training:
            return self._conv_forward(x, self.weight, self.bias) * scale
        bias = self.bias
        if bias is not None:
            bias = bias * scale
        return self._conv_forward(x, self.weight * scale, bias)


class _Residual(nn.Module):
    """What both blocks add to timm's.

    `norm_layer=nn.Identity` makes a block without normalization: its convolutions have biases, its branch the scalar
    alpha. `projection=True` gives it a 1x1 convolution as skip where timm's has none. `scalar_biases=True` replaces the
    biases of the convolutions by Fixup's: a scalar before each convolution of the branch, one after it, the last of all
    after alpha.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        norm_layer: type[nn.Module] = nn.Identity,
        projection: bool = False,
        scalar_biases: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(inplanes, planes, stride, downsample, norm_layer=norm_layer, **kwargs, **dd)
        normalized = norm_layer is not nn.Identity
        *_, (name, last) = ((n, m) for n, m in self.named_children() if isinstance(m, nn.Conv2d))
        if not normalized:  # with batch norm it stays as tools that fold or fuse the two expect it
            like = (last.in_channels, last.out_channels, last.kernel_size, 1, last.padding, last.dilation)
            setattr(self, name, ScaledConv2d(*like, bias=False, **dd))
        convs = [m for m in self.children() if isinstance(m, nn.Conv2d)]
        if projection and self.downsample is None:
            width = convs[-1].out_channels
            self.downsample = timm_resnet.downsample_conv(inplanes, width, 1, stride, norm_layer=norm_layer, **dd)
        self.register_parameter("alpha", None if normalized else nn.Parameter(torch.ones((), **dd)))
        self.register_parameter("biases", nn.Parameter(torch.zeros(2 * len(convs), **dd)) if scalar_biases else None)
        if not normalized and not scalar_biases:
            for conv in convs:  # the skip needs no bias of its own: the branch's last one is added to the same sum
                conv.bias = nn.Parameter(torch.zeros(conv.out_channels, **dd))

    def _before(self, x: Tensor, layer: int) -> Tensor:
        """The input of a convolution of the branch, counted from 0, with the scalars that stand before it."""
        if self.biases is None:
            return x
        return x + self.biases[2 * layer]

    def _after(self, x: Tensor, layer: int) -> Tensor:
        """The output of an inner convolution, with the scalar that stands after it."""
        if self.biases is None:
            return x
        return x + self.biases[2 * layer + 1]

    def _merge(self, branch: Tensor, x: Tensor) -> Tensor:
        if self.drop_path is not None:
            branch = self.drop_path(branch)
        if self.biases is not None:
            branch = branch + self.biases[-1]
        if self.downsample is not None:
            x = self.downsample(x)
        branch += x
        return branch


class BasicBlock(_Residual, timm_resnet.BasicBlock):
    """f is two 3x3 convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act1(self.bn1(self._after(self.conv1(self._before(x, 0)), 0)))
        branch = self._before(branch, 1)
        branch = self.conv2(branch) if self.alpha is None else self.conv2(branch, self.alpha)
        return self.act2(self._merge(self.bn2(branch), x))


class Bottleneck(_Residual, timm_resnet.Bottleneck):
    """f is a 1x1, a 3x3 and a 1x1 convolution, the inner width a quarter of the outer."""

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act1(self.bn1(self._after(self.conv1(self._before(x, 0)), 0)))
        branch = self.act2(self.bn2(self._after(self.conv2(self._before(branch, 1)), 1)))
        branch = self._before(branch, 2)
        branch = self.conv3(branch) if self.alpha is None else self.conv3(branch, self.alpha)
        return self.act3(self._merge(self.bn3(branch), x))
