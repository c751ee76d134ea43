"""What RISOTTO needs for strided layers that read every pixel (beyond the paper; README, "The method": *Patches*).

A centre tap of stride s reads one pixel of every s x s and drops the others; here the taps from the centre on read the
whole patch. Semi-orthogonal layers that widen and ones that narrow do not make an isometry together, unless those that
narrow know where the signal is. So the subspace that the signals of images span at a pixel goes along, as orthonormal
columns, and every layer is drawn to be isometric on it, or to fill its outputs from it.
"""

import torch
from torch import Tensor, nn

from .matrices import semi_orthogonal
from .structure import ResNetStructure

Rng = torch.Generator | None


def isometric_on(span: Tensor, outputs: int, generator: Rng = None) -> tuple[Tensor, Tensor]:
    """A random semi-orthogonal matrix that keeps what it can of a subspace.

    Args:
        span: The subspace: orthonormal columns, shape (inputs, d), float64.
        outputs: Rows of the matrix.
    Returns:
        The matrix, shape (outputs, inputs): isometric on the subspace where it has room for all d dimensions, else with
        orthonormal rows from within it. And the subspace that comes out, shape (outputs, min(d, outputs)).
    """
    inputs, d = span.shape
    if outputs < d:
        return semi_orthogonal(outputs, d, generator) @ span.T, torch.eye(outputs, device="cpu").to(span)
    others = orthogonal_to(span, min(inputs, outputs) - d, generator)
    read = torch.cat([span, others], dim=1)
    mixed = semi_orthogonal(outputs, read.shape[1], generator)
    return mixed @ read.T, mixed[:, :d]  # not the matrix times the span: rounding errors would double at every layer


def orthogonal_to(span: Tensor, count: int, generator: Rng = None) -> Tensor:
    """So many random orthonormal columns that are orthogonal to those of `span`: shape (n, d) to (n, count)."""
    columns = torch.randn(len(span), count, dtype=span.dtype, device="cpu", generator=generator)
    for _ in range(2):  # rounding leaves a little of the span in the first
        columns = torch.linalg.qr(columns - span @ (span.T @ columns)).Q
    return columns


def per_pixel(span: Tensor, pixels: int) -> Tensor:
    """The subspace of so many pixels side by side: shape (n, d) to (pixels n, pixels d)."""
    return torch.block_diag(*[span] * pixels)


def block_signal(matrices: list[Tensor], alpha: float) -> Tensor:
    """What a block with an identity skip does to the signal, shape (N/2, N/2), measured on unit signals."""
    pairs = matrices[0].shape[1] // 2
    x = branch = torch.eye(2 * pairs, pairs, device="cpu").to(matrices[0])
    for matrix in matrices[:-1]:
        branch = (matrix @ branch).relu()
    plus, minus = (alpha * matrices[-1] @ branch + x).relu().chunk(2)
    return plus - minus


def pixels_per_step(conv: nn.Conv2d) -> int:
    """Pixels of the patch that each output of a strided layer stands for; 1 without a stride."""
    return conv.stride[0] * conv.stride[1]


def check_patches(structure: ResNetStructure) -> None:
    """Refuse strided layers whose kernels cannot read their patches.

    Raises:
        ValueError: If a patch is larger than the kernel from its centre on, its layer is dilated, or the stride of a
            block is spread over several layers; the message names the layer.
    """
    for layer, conv in enumerate(structure.stem):
        _check_patch(f"layer {layer + 1} of the stem", conv)
    for block in structure.blocks:
        for layer, conv in enumerate(block.convs):
            _check_patch(f"{block.name}.conv{layer + 1}", conv)
        if block.skip is not None and all(conv.stride != block.skip.stride for conv in block.convs):
            raise ValueError(f"{block.name}: patches need the stride of a block in one of its convolutions")


def _check_patch(name: str, conv: nn.Conv2d) -> None:
    if pixels_per_step(conv) == 1:
        return
    if tuple(conv.dilation) != (1, 1):
        raise ValueError(f"{name}: patches do not go with a layer that is both strided and dilated")
    room = tuple(k - k // 2 for k in conv.kernel_size)
    if any(s > r for s, r in zip(conv.stride, room, strict=True)):
        kernel, stride = ("x".join(map(str, size)) for size in (conv.kernel_size, conv.stride))
        raise ValueError(f"{name}: patches do not fit: a {kernel} kernel does not cover the {stride} pixels of a step")


@torch.no_grad()
def patch_kernel_(conv: nn.Conv2d, matrices: list[Tensor]) -> None:
    """Write a matrix, shape (out_channels, in_channels), for each pixel of the patch, in rows; zero elsewhere, bias 0.

    With fewer matrices than pixels, the first pixels of the patch are left out.
    """
    rows, columns = conv.stride
    top, left = (size // 2 for size in conv.kernel_size)
    conv.weight.zero_()
    for pixel, matrix in enumerate(matrices, start=rows * columns - len(matrices)):
        conv.weight[:, :, top + pixel // columns, left + pixel % columns] = matrix.to(conv.weight)
    if conv.bias is not None:
        conv.bias.zero_()
