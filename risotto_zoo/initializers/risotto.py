"""RISOTTO: exact dynamical isometry for ReLU ResNets (Gadhikar and Burkholz, arXiv 2210.02411).

The method (looks-linear orthogonal layers, a skip or branch that makes up the difference to an orthogonal map) is the
paper's. The constructions for identity skips are this project's; the one for bottlenecks, blocks that rotate some pairs
only, and strided layers that read every pixel go beyond the paper.
"""

import itertools

import torch
from torch import Tensor, nn

from .matrices import (
    delta_kernel_,
    looks_linear,
    semi_orthogonal,
    signed_permutation,
    signed_selection,
)
from .patches import (
    block_signal,
    check_patches,
    isometric_on,
    orthogonal_to,
    patch_kernel_,
    per_pixel,
    pixels_per_step,
)
from .structure import Block, ResNetStructure, check_arguments, resnet_structure

Rng = torch.Generator | None


def stem_matrix(out_channels: int, in_channels: int, generator: Rng = None) -> Tensor:
    """W = [U; -U], shape (N, C_in), U of shape (N/2, C_in) semi-orthogonal: the first signal is U times the pixel."""
    u = semi_orthogonal(out_channels // 2, in_channels, generator)
    return torch.cat([u, -u])


def layer_matrix(out_channels: int, in_channels: int, generator: Rng = None) -> Tensor:
    """W = LL(U), shape (N_out, N_in), U semi-orthogonal: a layer outside any block, as in a stem of several."""
    return looks_linear(semi_orthogonal(out_channels // 2, in_channels // 2, generator))


def head_matrix(classes: int, features: int, pools: int = 1, generator: Rng = None) -> Tensor:
    """W = [U, -U], shape (classes, features), U of shape (classes, features/2) semi-orthogonal.

    `pools` is the number of feature maps that pooling concatenates (2 for timm's 'catavgmax'): each has its own pairs,
    so each gets its own columns of U.
    """
    u = semi_orthogonal(classes, features // 2, generator)
    return torch.cat([torch.cat([part, -part], dim=1) for part in u.chunk(pools, dim=1)], dim=1)


def projection_block(
    widths: list[int], alpha: float, generator: Rng = None, m: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Branch and skip matrices of a block with a projection skip (the paper's type C).

    W_i = LL(U_i), W_skip = LL(M - alpha U_m ... U_1), so that alpha f + h = LL(M), whatever alpha is.

    Args:
        widths: channels of the input and after each of the layers of the branch, even numbers.
        m: M, shape (widths[-1] / 2, widths[0] / 2), if it is not to be drawn.
    Returns:
        The W_i, each of shape (widths[i + 1], widths[i]), and W_skip of shape (widths[-1], widths[0]).
    """
    pairs = [w // 2 for w in widths]
    us = [semi_orthogonal(rows, cols, generator) for cols, rows in itertools.pairwise(pairs)]
    if m is None:
        m = semi_orthogonal(pairs[-1], pairs[0], generator)
    product = us[0]
    for u in us[1:]:
        product = u @ product
    return [looks_linear(u) for u in us], looks_linear(m - alpha * product)


def rotation(pairs: int, rotated: int | None = None, generator: Rng = None) -> Tensor:
    """LL(M) - I on a random subset of so many pairs, all if None, and zero elsewhere, shape (2 pairs, 2 pairs).

    Added to the identity it maps the subset's signal by M, and leaves the others, which are nonnegative, to the skip.
    """
    if rotated is None or rotated >= pairs:
        m = looks_linear(semi_orthogonal(pairs, pairs, generator))
        return m - torch.eye(2 * pairs, device="cpu").to(m)
    chosen = torch.randperm(pairs, generator=generator, device="cpu")[:rotated]
    channels = torch.cat([chosen, chosen + pairs])
    result = torch.zeros(2 * pairs, 2 * pairs, dtype=torch.float64, device="cpu")
    result[channels[:, None], channels] = rotation(rotated, None, generator)
    return result


def identity_basic_block(
    channels: int, alpha: float, generator: Rng = None, rotated: int | None = None
) -> list[Tensor]:
    """The two branch matrices of a basic block with an identity skip (the paper's type B; construction ours).

    W_1 = LL(P), P a signed permutation, passes x through its ReLU as Q x; W_2 = R Q^T / alpha with the rotation
    R = LL(M) - I then makes alpha f + x = LL(M) x. Both of shape (N, N). alpha must not be 0. With `rotated` pairs R is
    zero outside a random subset of so many, which the skip then passes, as in a bottleneck.
    """
    p = signed_permutation(channels // 2, generator)
    return [looks_linear(p), _columns_permuted(rotation(channels // 2, rotated, generator), p) / alpha]


def identity_bottleneck_block(
    channels: int, width: int, alpha: float, generator: Rng = None, rotated: int | None = None
) -> list[Tensor]:
    """The three branch matrices of a bottleneck with an identity skip (beyond the paper).

    A random subset of n/2 of the N/2 pairs is rotated, n the bottleneck's width; the skip passes the others.
    W_1 = LL(P_1), P_1 the signed selection of the subset, shape (n, N); W_2 = LL(P_2), P_2 a signed permutation,
    shape (n, n); W_3 = S^T R S Q_1^T Q_2^T / alpha, shape (N, n), with the rotation R = LL(M) - I and S the unsigned
    selection of the subset: its rows outside the subset are zero. alpha must not be 0. `rotated` pairs, if given, are
    so many of the subset.
    """
    p1 = signed_selection(width // 2, channels // 2, generator)
    p2 = signed_permutation(width // 2, generator)
    r = rotation(width // 2, rotated, generator)
    # Row i of P_2 P_1 reads pair chosen[i] with sign signs[i]: the branch holds the subset permuted and signed.
    chain = p2 @ p1
    chosen = chain.abs().argmax(dim=1)
    signs = torch.diag(chain.sum(dim=1))
    w3 = r.new_zeros(channels, width)
    w3[torch.cat([chosen, chosen + channels // 2])] = _columns_permuted(r, signs) / alpha
    return [looks_linear(p1), looks_linear(p2), w3]


def _columns_permuted(matrix: Tensor, p: Tensor) -> Tensor:
    """matrix Q^T, where Q = [[P+, P-], [P-, P+]] is the plain permutation with relu(LL(P) x) = Q x for paired x >= 0.

    Row i of Q has its one at column source[i], so column i of the result is column source[i] of the matrix.
    """
    pair, negative = p.abs().argmax(dim=1), p.sum(dim=1) < 0
    half = p.shape[1]
    source = torch.cat([pair + half * negative, pair + half * ~negative])
    return matrix[:, source]


@torch.no_grad()
def risotto_(
    model: nn.Module,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
    rotated_pairs: int | None = None,
    patches: bool = False,
) -> nn.Module:
    """Initialize a ResNet in place so that its input-output Jacobian on signals is exactly orthogonal.

    Works on the models of this package and on plain timm and torchvision ResNets, which it reads by their block and
    attribute names. Batch normalization gets gamma = 1, beta = 0 and fresh running statistics; where a block has no
    `alpha` of its own, the gamma of its last normalization starts at alpha. A max pool is let through, as nets with
    batch normalization keep theirs, but a net with one is no isometry: the map is exact up to the pool, and the
    identity skips behind it no longer see pairs of which one is zero. timm's `replace_stem_pool=True`, or `maxpool`
    set to `nn.Identity()`, makes it exact (with batch normalization up to its eps). Weights are computed in float64
    on the CPU, then cast: the same generator seed gives the same weights on every device.

    Args:
        model: The network, on any device, of any floating dtype.
        alpha: Weight of the residual branch at the start, 1 if None. 0 (the skip alone) needs a projection skip in
            every block. With projection skips a large one costs digits: singular values are then off by some |alpha|
            times the dtype's eps.
        generator: Source of randomness, a CPU generator; the global one if None.
        rotated_pairs: How many pairs of channels a block with an identity skip rotates, a random subset of its own; all
            that its branch is wide enough for if None. Fewer make branches of smaller kernels, and so steps of training
            that change a deep net less, at the same isometry. Blocks with a projection skip rotate all.
        patches: Whether strided layers read the whole patch of pixels that each of their outputs stands for, and not
            its first pixel alone. In a strided block the skip carries the first pixel, the branch the others, into what
            the skip leaves free. The map then keeps as many dimensions of an image as the widths of skips and branches
            let through (`risotto_resnet18_cifar` and `risotto_resnet50_cifar`: all). Its non-zero singular values are 1
            for images whose sides are multiples of the total stride; at other sizes, with zero padding, some are
            between 0 and 1. With a max pool, that holds of what is behind it.
    Returns:
        The same model.
    Raises:
        ValueError: If the network cannot be initialized exactly (the message names the module and the reason), or if
            alpha, the generator, rotated_pairs or patches does not fit. No weight has changed then.

    Source: arXiv 2210.02411 for the method; bottlenecks, rotated_pairs and patches go beyond it (README, "The method").
    """
    structure = resnet_structure(model)
    alpha = 1.0 if alpha is None else alpha
    check_arguments(structure, alpha, generator)
    check_options(rotated_pairs, patches)
    for block in structure.blocks:
        _check_block(block, alpha, patches)
    if patches:
        check_patches(structure)
    else:
        _check_widths(model, structure)
    for name, module in model.named_modules():
        if module in structure.norms and module.running_mean is None:
            raise ValueError(
                f"{name}: without running statistics it divides by those of each batch, and nothing is exact"
            )
    features = structure.blocks[-1].convs[-1].out_channels
    if structure.head is not None:
        _check_head(structure.head, features)

    structure.reset(alpha)
    span = _write_stem(structure.stem, generator, patches)
    if patches and any(isinstance(module, nn.MaxPool2d) for module in model.modules()):
        span = torch.eye(len(span), device="cpu").to(span)  # a pool does not keep to a subspace
    for block in structure.blocks:
        if span is not None and block.skip is not None and pixels_per_step(block.skip) > 1:
            span = _write_strided_block(block, alpha, generator, span)
        else:
            span = _write_block(block, alpha, generator, rotated_pairs, span)
    if structure.head is not None:
        risotto_head_(structure.head, features, generator)
    return model


@torch.no_grad()
def risotto_head_(head: nn.Linear, features: int, generator: torch.Generator | None = None) -> None:
    """Initialize a linear classifier on paired channels in place, as `head_matrix` states; its bias is 0.

    Args:
        head: Weight of shape (classes, pools * features), where pooling concatenates `pools` maps of features.
        features: Channels of the last feature map, an even number.
        generator: Source of randomness, a CPU generator; the global one if None.
    Raises:
        ValueError: If the head's inputs are no multiple of `features`. No weight has changed then.

    Source: arXiv 2210.02411; heads behind several pools go beyond it.
    """
    _check_head(head, features)
    pools = head.in_features // features
    head.weight.copy_(head_matrix(head.out_features, head.in_features, pools, generator))
    if head.bias is not None:
        head.bias.zero_()


def check_options(rotated_pairs: int | None, patches: bool) -> None:
    """Refuse values that `risotto_` can do nothing with for any net.

    Raises:
        ValueError: If rotated_pairs is no whole number from 1 or None, or patches no bool.
    """
    if rotated_pairs is not None and (type(rotated_pairs) is not int or rotated_pairs < 1):
        raise ValueError(f"rotated_pairs is {rotated_pairs!r}, not a number of pairs from 1")
    if type(patches) is not bool:
        raise ValueError(f"patches is {patches!r}, not True or False")


def _check_widths(model: nn.Module, structure: ResNetStructure) -> None:
    """Refuse a layer that narrows a signal which does not fill its channels: it would drop a part of it.

    The signal fills the channels of the stem's first layer where there are at most as many as the image has, and stays
    so until a layer widens.
    """
    first, *others = structure.stem
    fills = first.out_channels // 2 <= first.in_channels
    for layer in [*others, *(block.skip for block in structure.blocks if block.skip is not None)]:
        if layer.out_channels < layer.in_channels and not fills:
            name = next(name for name, module in model.named_modules() if module is layer)
            raise ValueError(
                f"{name}: from {layer.in_channels} to {layer.out_channels} channels a part of the signal is lost"
            )
        fills = fills and layer.out_channels <= layer.in_channels


def _check_head(head: nn.Linear, features: int) -> None:
    if features < 2 or features % 2 or head.in_features < features or head.in_features % features:
        raise ValueError(f"fc: {head.in_features} inputs are no multiple of {features} paired feature channels")


def _check_block(block: Block, alpha: float, patches: bool) -> None:
    if block.skip is None and alpha == 0:
        raise ValueError(f"{block.name}: alpha=0 with an identity skip leaves no branch to make the map orthogonal")
    divides = block.skip is None or (patches and pixels_per_step(block.skip) > 1 and alpha != 0)
    dtype = block.convs[-1].weight.dtype
    if divides and 2 / abs(alpha) > torch.finfo(dtype).max:  # the largest weight that LL(M) - I over alpha can have
        raise ValueError(f"{block.name}: alpha={alpha} makes weights of the branch that {dtype} cannot hold")
    if block.skip is not None:
        return
    channels, *inner = [block.convs[0].in_channels] + [conv.out_channels for conv in block.convs[:-1]]
    if len(block.convs) == 2 and inner != [channels]:
        raise ValueError(f"{block.name}: an identity skip needs {channels} inner channels, found {inner[0]}")
    if len(block.convs) == 3 and (inner[0] != inner[1] or inner[0] > channels):
        raise ValueError(f"{block.name}: inner widths {inner} of a bottleneck must be equal and at most {channels}")


def _write_stem(convs: list[nn.Conv2d], generator: Rng, patches: bool) -> Tensor | None:
    """With patches, returns the subspace that the signal of an image spans behind the stem."""
    first, *others = convs
    if not patches:
        delta_kernel_(first, stem_matrix(first.out_channels, first.in_channels, generator))
        for conv in others:
            delta_kernel_(conv, layer_matrix(conv.out_channels, conv.in_channels, generator))
        return None
    colors = torch.eye(first.in_channels, dtype=torch.float64, device="cpu")
    pixels = pixels_per_step(first)
    u, span = isometric_on(per_pixel(colors, pixels), first.out_channels // 2, generator)
    patch_kernel_(first, [torch.cat([part, -part]) for part in u.chunk(pixels, dim=1)])
    for conv in others:
        span = _write_patch_layer(conv, span, pixels_per_step(conv), generator)
    return span


def _write_patch_layer(conv: nn.Conv2d, span: Tensor, pixels: int, generator: Rng) -> Tensor:
    u, span = isometric_on(per_pixel(span, pixels), conv.out_channels // 2, generator)
    patch_kernel_(conv, [looks_linear(part) for part in u.chunk(pixels, dim=1)])
    return span


def _write_block(block: Block, alpha: float, generator: Rng, rotated: int | None, span: Tensor | None) -> Tensor | None:
    """`span` is the subspace that the signal of an image spans, None without patches; returns that behind the block."""
    channels, width = block.convs[0].in_channels, block.convs[0].out_channels
    if block.skip is not None:
        widths = [channels] + [conv.out_channels for conv in block.convs]
        m = None
        if span is not None:
            m, span = isometric_on(span, widths[-1] // 2, generator)
        matrices, skip = projection_block(widths, alpha, generator, m)
        delta_kernel_(block.skip, skip)
    elif len(block.convs) == 2:
        matrices = identity_basic_block(channels, alpha, generator, rotated)
    else:
        matrices = identity_bottleneck_block(channels, width, alpha, generator, rotated)
    if span is not None and block.skip is None:
        span = block_signal(matrices, alpha) @ span
    for conv, matrix in zip(block.convs, matrices, strict=True):
        delta_kernel_(conv, matrix)
    return span


def _write_strided_block(block: Block, alpha: float, generator: Rng, span: Tensor) -> Tensor:
    """The skip carries the first pixel of the patch, the branch the others, into what the skip leaves free."""
    matrix, kept = isometric_on(span, block.skip.out_channels // 2, generator)
    delta_kernel_(block.skip, looks_linear(matrix))
    *inner, last = block.convs
    for conv in inner:
        span = _write_patch_layer(conv, span, max(1, pixels_per_step(conv) - 1), generator)
    pixels = max(1, pixels_per_step(last) - 1)
    free = orthogonal_to(kept, len(kept) - kept.shape[1], generator)
    u, span = isometric_on(per_pixel(span, pixels), free.shape[1], generator)
    patch_kernel_(last, [looks_linear(free @ part / (alpha or 1)) for part in u.chunk(pixels, dim=1)])
    return torch.cat([kept, free @ span], dim=1) if alpha else kept
