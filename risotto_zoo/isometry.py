"""Measurements of signal and Jacobian (README, "The method": *Checked*). Imports torch only.

The signal of a feature map of N channels is s(x) = x[:N/2] - x[N/2:], the quantity a RISOTTO net transports exactly.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def signal(features: Tensor) -> Tensor:
    """s(x) = x+ - x-: shape (B, N, ...) to (B, N/2, ...)."""
    plus, minus = features.chunk(2, dim=1)
    return plus - minus


def signal_map(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The map whose isometry is claimed: images (B, C, H, W) to the signal of the last feature map, flat (B, D).

    Works on anything with timm's `forward_features`, and on torchvision's ResNet.

    Raises:
        ValueError: For any other model, also one that wraps such a net.
    """
    features = getattr(model, "forward_features", None)
    if features is None:
        children = dict(model.named_children())
        if not {"conv1", "layer1"} <= children.keys():
            raise ValueError(
                f"{type(model).__name__} has neither timm's forward_features nor the children of torchvision's ResNet; "
                "if it wraps such a net, pass that (its .module or ._orig_mod)"
            )
        features = nn.Sequential(*(part for name, part in children.items() if name not in ("avgpool", "fc")))
    return lambda images: signal(features(images)).flatten(1)


@torch.inference_mode(False)
def singular_values(function: Callable[[Tensor], Tensor], image: Tensor, chunk: int = 64) -> Tensor:
    """All singular values of the Jacobian of `function` at one image, exactly, in descending order.

    Args:
        function: Maps images (B, C, H, W) to vectors (B, D), each image by itself (batch norm: evaluation mode).
        image: Shape (C, H, W); the Jacobian is taken in its dtype and on its device. In float32 on a GPU torch lets
            convolutions run in TF32, with an error of 1e-3; take float64, or torch.backends.cudnn.allow_tf32 = False.
        chunk: Number of columns or rows computed at once.
    Returns:
        min(D, C H W) values on the CPU. Those of columns that are exactly zero are zeros at the end.

    Columns at input values that the output does not depend on (pixels that strides skip) are found by one random
    cotangent, which almost surely leaves no other column empty, and are not computed. The rest takes forward-mode
    columns or reverse-mode rows, whichever are fewer.
    """
    image = image.detach().clone()
    outputs = function(image[None]).shape[1]
    rank_bound = min(outputs, image.numel())
    cotangent = torch.randn(1, outputs, generator=torch.Generator().manual_seed(0), device="cpu").to(image)
    reached = _vjp(function, image[None], cotangent)[0].flatten().nonzero()[:, 0]
    if len(reached) == 0:
        return image.new_zeros(rank_bound).cpu()
    if len(reached) <= outputs:
        basis = nn.functional.one_hot(reached, image.numel()).to(image).unflatten(1, image.shape)
        parts = [_jvp(function, image.expand_as(b), b) for b in basis.split(chunk)]
    else:
        basis = torch.eye(outputs, device="cpu").to(image)
        parts = [
            _vjp(function, image.expand(len(b), *image.shape), b).flatten(1)[:, reached] for b in basis.split(chunk)
        ]
    values = _singular_values_of(torch.cat(parts))
    return torch.cat([values, values.new_zeros(rank_bound - len(values))])


@torch.inference_mode(False)
def probed_singular_values(function: Callable[[Tensor], Tensor], image: Tensor, probes: int = 16) -> Tensor:
    """Singular values of the Jacobian restricted to a random subspace of its row space, for large images.

    Random cotangents, the same each time, are pulled back (VJP), the results made orthonormal, and pushed forward
    (JVP): the first half of a randomized SVD (Halko et al., arXiv 0909.4061). Every value lies between the smallest
    non-zero and the largest singular value of the Jacobian, and all are 1 if it is an isometry on its row space.

    Args:
        function: As for `singular_values`.
        image: Shape (C, H, W).
        probes: Number of values; fewer come back if the Jacobian's rank is lower.
    """
    image = image.detach().clone()
    outputs = function(image[None]).shape[1]
    probes = min(probes, outputs, image.numel())
    cotangents = torch.randn(probes, outputs, generator=torch.Generator().manual_seed(0), device="cpu").to(image)
    pulled = _vjp(function, image.expand(probes, *image.shape), cotangents).flatten(1)
    _, scale, rows = torch.linalg.svd(pulled.cpu().double(), full_matrices=False)
    rows = rows[scale > scale.max() * 1e-6].unflatten(1, image.shape).to(image)
    pushed = _jvp(function, image.expand_as(rows), rows)
    return _singular_values_of(pushed)


def _singular_values_of(matrix: Tensor) -> Tensor:
    """In float64, lest the decomposition's own rounding, which grows with the image, be taken for the net's."""
    return torch.linalg.svdvals(matrix.cpu().double()).to(torch.promote_types(matrix.dtype, torch.float32))


def _vjp(function: Callable[[Tensor], Tensor], images: Tensor, cotangents: Tensor) -> Tensor:
    """J^T u of each image and its cotangent, shapes (B, C, H, W) and (B, D)."""
    images = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(function(images), images, cotangents)[0]


def _jvp(function: Callable[[Tensor], Tensor], images: Tensor, tangents: Tensor) -> Tensor:
    """J v of each image and its tangent, shapes both (B, C, H, W); result (B, D)."""
    with torch.no_grad(), forward_ad.dual_level(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script`", FutureWarning)  # torch's own use of it
        dual = forward_ad.make_dual(images.contiguous(), tangents.contiguous())
        return forward_ad.unpack_dual(function(dual)).tangent


@dataclass
class BlockSignal:
    """What one block does to a batch of images."""

    name: str
    norm: float  # root mean square over images of the norm of the signal
    similarity: float  # mean cosine similarity of the signals of different images
    activation_similarity: float  # the same of the activations themselves, which are nonnegative


@torch.no_grad()
def signal_by_block(model: nn.Module, images: Tensor, whole_maps: bool = False) -> list[BlockSignal]:
    """Norm and cosine similarity after every residual block, at the pixels that reach the last map.

    Strides sample pixels; comparing depths is fair only on the pixels that all of them see, so every map is read at
    the stride of the last one.

    Args:
        model: A ResNet with stages `layer1`, `layer2`, ...
        images: Two or more images, shape (B, C, H, W).
        whole_maps: Read every map as it is: for a start with `patches`, whose strides drop no pixel. The norm then
            falls where channels have no room for all of a patch.
    Raises:
        ValueError: If fewer than two images are given, or the net has no such stages.
    """
    if len(images) < 2:
        raise ValueError("similarity needs at least two images")
    maps: dict[str, Tensor] = {}
    handles = []
    for i in range(1, 10):
        for name, block in getattr(model, f"layer{i}", nn.Sequential()).named_children():
            keep = lambda _module, _inputs, output, key=f"layer{i}.{name}": maps.update({key: output})  # noqa: E731
            handles.append(block.register_forward_hook(keep))
    try:
        signal_map(model)(images)
    finally:
        for handle in handles:
            handle.remove()
    if not maps:
        raise ValueError(f"{type(model).__name__} is not a ResNet: it has no blocks in layer1, layer2, ...")
    last = next(reversed(maps.values())).shape[2:]
    results = []
    for name, full in maps.items():
        rows, cols = (1 << (-(-side // end) - 1).bit_length() for side, end in zip(full.shape[2:], last, strict=True))
        if not whole_maps:
            full = full[..., ::rows, ::cols]  # the power of two between the two sizes
        full = full.double().cpu()
        signals = signal(full).flatten(1)
        norm = signals.norm(dim=1).square().mean().sqrt().item()
        results.append(BlockSignal(name, norm, _similarity(signals), _similarity(full.flatten(1))))
    return results


def _similarity(rows: Tensor) -> float:
    """Mean cosine of all pairs of different rows; nan if one is zero."""
    unit = rows / rows.norm(dim=1, keepdim=True)  # torch's own normalize sets a floor, which small signals are below
    different = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return (unit @ unit.T)[different].mean().item()
