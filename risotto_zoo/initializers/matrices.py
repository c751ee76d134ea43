"""The random matrices RISOTTO is built from, and the kernel that carries one (README, "The method")."""

import torch
from torch import Tensor, nn


def semi_orthogonal(rows: int, cols: int, generator: torch.Generator | None = None) -> Tensor:
    """Haar-distributed semi-orthogonal matrix, shape (rows, cols), float64, on the CPU.

    Columns are orthonormal if rows >= cols, rows are orthonormal otherwise. It is the Q of the QR decomposition of a
    Gaussian matrix, the signs of R's diagonal moved into it. The Householder vectors of that decomposition are
    themselves independent Gaussians, of lengths n, n - 1, ... (Stewart 1980, SIAM J. Numer. Anal. 17), so they are
    drawn directly: the same distribution at half the cost. They are drawn in float32, five times as fast: what is
    exact is the arithmetic on them.
    """
    tall, narrow = max(rows, cols), min(rows, cols)
    x = torch.randn(tall, narrow, dtype=torch.float32, device="cpu", generator=generator).tril_().double()
    diagonal = x.diagonal()
    diagonal[diagonal == 0] = torch.finfo(torch.float32).tiny  # float32 has exact zeros, which have no direction
    top = x.diagonal().clone()
    r = torch.where(top < 0, 1.0, -1.0) * x.norm(dim=0)  # R's diagonal: each column is reflected onto r e_1
    q = torch.linalg.householder_product(x / (top - r), (r - top) / r)
    q *= r.sign()
    return q if rows >= cols else q.T


def signed_permutation(size: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniformly random signed permutation matrix, shape (size, size), float64: one entry of +-1 a row and column."""
    return signed_selection(size, size, generator)


def signed_selection(rows: int, cols: int, generator: torch.Generator | None = None) -> Tensor:
    """`rows` distinct coordinates out of `cols` in random order with random signs, shape (rows, cols), float64."""
    chosen = torch.randperm(cols, device="cpu", generator=generator)[:rows]
    signs = 1 - 2 * torch.randint(2, (rows,), device="cpu", generator=generator).double()
    selection = torch.zeros(rows, cols, dtype=torch.float64, device="cpu")
    selection[torch.arange(rows, device="cpu"), chosen] = signs
    return selection


def looks_linear(u: Tensor) -> Tensor:
    """LL(U) = [[U, -U], [-U, U]]: shape (m, n) to (2m, 2n).

    On x = relu([z; -z]) it acts as U acts on z: relu(LL(U) x) = relu([U z; -U z]).
    """
    rows, cols = u.shape
    matrix = u.new_empty(2 * rows, 2 * cols)
    matrix[:rows, :cols] = matrix[rows:, cols:] = u
    torch.neg(u, out=matrix[:rows, cols:])
    torch.neg(u, out=matrix[rows:, :cols])
    return matrix


@torch.no_grad()
def delta_kernel_(conv: nn.Conv2d, matrix: Tensor) -> None:
    """Write `matrix`, shape (out_channels, in_channels), into the centre tap of `conv`; zero elsewhere and bias 0."""
    height, width = conv.kernel_size
    conv.weight.zero_()
    conv.weight[:, :, height // 2, width // 2] = matrix.to(conv.weight)
    if conv.bias is not None:
        conv.bias.zero_()
