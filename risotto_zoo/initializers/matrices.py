"""The random matrices RISOTTO is built from, and the kernel that carries one (design: "The mathematics")."""

import torch
from torch import Tensor, nn


def semi_orthogonal(rows: int, cols: int, generator: torch.Generator | None = None) -> Tensor:
    """Haar-distributed semi-orthogonal matrix, shape (rows, cols), float64, on the CPU.

    Columns are orthonormal if rows >= cols, rows are orthonormal otherwise. QR of a Gaussian matrix with the signs
    of R's diagonal moved into Q, without which the distribution would not be Haar (Mezzadri, math-ph/0609050).
    """
    tall, narrow = max(rows, cols), min(rows, cols)
    q, r = torch.linalg.qr(torch.randn(tall, narrow, dtype=torch.float64, generator=generator))
    q *= torch.where(r.diagonal() < 0, -1.0, 1.0)
    return q if rows >= cols else q.T


def signed_permutation(size: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniformly random signed permutation matrix, shape (size, size), float64: one entry of +-1 a row and column."""
    return signed_selection(size, size, generator)


def signed_selection(rows: int, cols: int, generator: torch.Generator | None = None) -> Tensor:
    """`rows` distinct coordinates out of `cols` in random order with random signs, shape (rows, cols), float64."""
    chosen = torch.randperm(cols, generator=generator)[:rows]
    signs = 1 - 2 * torch.randint(2, (rows,), generator=generator).double()
    selection = torch.zeros(rows, cols, dtype=torch.float64)
    selection[torch.arange(rows), chosen] = signs
    return selection


def looks_linear(u: Tensor) -> Tensor:
    """LL(U) = [[U, -U], [-U, U]]: shape (m, n) to (2m, 2n).

    On x = relu([z; -z]) it acts as U acts on z: relu(LL(U) x) = relu([U z; -U z]).
    """
    row = torch.cat([u, -u], dim=1)
    return torch.cat([row, -row])


@torch.no_grad()
def delta_kernel_(conv: nn.Conv2d, matrix: Tensor) -> None:
    """Write `matrix`, shape (out_channels, in_channels), into the centre tap of `conv`; zero elsewhere and bias 0."""
    height, width = conv.kernel_size
    conv.weight.zero_()
    conv.weight[:, :, height // 2, width // 2] = matrix.to(conv.weight)
    if conv.bias is not None:
        conv.bias.zero_()
