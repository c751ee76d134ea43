"""Augmentation of whole batches on the training device, every image by itself, reproducible from the seed.

The random numbers of a step are drawn for the whole global batch on the CPU, and each process takes the rows of its own
images: neither the number of processes nor the device changes what happens to an image.
"""

import hashlib
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .recipe import Augment


def generator_of(*key: object) -> torch.Generator:
    """A CPU generator for one purpose, fixed by the key (such as seed, 'order', epoch): nothing to save or restore."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass
class Draw:
    """Random numbers of a batch, one row an image; uniform in [0, 1) where not said otherwise."""

    flip: Tensor  # (B,)
    shift: Tensor  # (B, 2) vertical, horizontal
    crop: Tensor  # (B, 4) area, aspect ratio, vertical and horizontal position
    cutout: Tensor  # (B, 2) centre
    partner: Tensor  # (B,) position in the global batch of the image mixed in
    share: Tensor  # (B,) share of the image itself, Beta distributed; 1 where nothing is mixed
    box: Tensor  # (B, 3) cutmix instead of mixup (1 or 0), centre of the box

    def rows(self, which: Tensor | slice) -> "Draw":
        return Draw(*(getattr(self, f.name)[which] for f in fields(self)))

    def to(self, device: torch.device) -> "Draw":
        return Draw(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def draw(batch: int, augment: Augment, generator: torch.Generator) -> Draw:
    """Random numbers for a global batch."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator)

    share, cutmix = torch.ones(batch), torch.zeros(batch)
    if augment.mixup or augment.cutmix:
        total = (augment.mixup > 0) + (augment.cutmix > 0)
        cutmix = (uniform() < (augment.cutmix > 0) / total).float()
        concentration = torch.where(cutmix > 0, augment.cutmix, augment.mixup)
        share = _beta(concentration, generator)
        if augment.mixup_prob < 1:  # asked, so that a recipe without it draws what it always drew
            share = torch.where(uniform() < augment.mixup_prob, share, 1.0)
    return Draw(
        flip=uniform(),
        shift=uniform(2),
        crop=uniform(4),
        cutout=uniform(2),
        partner=torch.randperm(batch, generator=generator),
        share=share,
        box=torch.cat([cutmix[:, None], uniform(2)], dim=1),
    )


def _beta(concentration: Tensor, generator: torch.Generator) -> Tensor:
    """Symmetric Beta(a, a) numbers; torch's own sampler takes no generator for them, its Gamma sampler does."""
    gamma = torch._standard_gamma(concentration.repeat(2, 1).double(), generator=generator).clamp_min(1e-30)
    return (gamma[0] / gamma.sum(dim=0)).float()


def augmented(data: Tensor, index: Tensor, size: int, augment: Augment, d: Draw, mean: Tensor, std: Tensor) -> Tensor:
    """Images `index` of the resident uint8 set, augmented and normalized: float, shape (B, C, size, size).

    Args:
        data: All images, shape (N, C, H, W), on the training device.
        index: Positions in `data`, shape (B,).
        mean, std: Per channel on the 0..1 scale, shape (C,).
    """
    height, width = data.shape[-2:]
    device = data.device
    rows = torch.arange(height, device=device).expand(len(index), -1)
    cols = torch.arange(width, device=device).expand(len(index), -1)
    if augment.shift:
        offsets = (d.shift * (2 * augment.shift + 1)).floor().long() - augment.shift
        rows, cols = _reflected(rows + offsets[:, :1], height), _reflected(cols + offsets[:, 1:], width)
    if augment.flip:
        cols = torch.where((d.flip < 0.5)[:, None], width - 1 - cols, cols)
    channels = torch.arange(data.shape[1], device=device)
    # One gather does order, shift and flip, on bytes.
    batch = data[index[:, None, None, None], channels[:, None, None], rows[:, None, :, None], cols[:, None, None, :]]
    batch = (batch.float() / 255 - mean[:, None, None]) / std[:, None, None]
    if augment.crop_scale is not None:
        batch = _resized_crops(batch, size, augment.crop_scale, d.crop)
    if augment.cutout:
        batch = batch * ~_boxes(d.cutout, torch.full_like(d.flip, augment.cutout / size), size)[:, None]
    return batch


def mixed(images: Tensor, partners: Tensor, d: Draw) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of each image with its partner; returns the batch and the share of each image in its target."""
    size = images.shape[-1]
    cutmix = d.box[:, 0] > 0
    inside = _boxes(d.box[:, 1:], (1 - d.share).sqrt(), size)
    pasted = torch.where(inside[:, None], partners, images)
    blended = images * d.share[:, None, None, None] + partners * (1 - d.share)[:, None, None, None]
    area = inside.flatten(1).float().mean(dim=1)  # what is really pasted, at the image's edges less than was drawn
    share = torch.where(cutmix, 1 - area, d.share)
    return torch.where(cutmix[:, None, None, None], pasted, blended), share


def _reflected(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def _boxes(centre: Tensor, side: Tensor, size: int) -> Tensor:
    """Masks of squares, shape (B, size, size): centres (B, 2) and sides (B,) as shares of the image."""
    pixel = (torch.arange(size, device=centre.device) + 0.5) / size
    inside = (pixel - centre[:, :, None]).abs() <= side[:, None, None] / 2
    return inside[:, 0, :, None] & inside[:, 1, None, :]


def _resized_crops(images: Tensor, size: int, scale: tuple[float, float], u: Tensor) -> Tensor:
    """Random resized crops: area uniform in `scale`, aspect ratio log-uniform in 3/4..4/3, any position."""
    area = scale[0] + u[:, 0] * (scale[1] - scale[0])
    ratio = torch.exp((2 * u[:, 1] - 1) * torch.log(torch.tensor(4 / 3)))
    extent = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=1).clamp(max=1)  # height, width
    centre = (2 * u[:, 2:] - 1) * (1 - extent)
    zero = torch.zeros_like(area)
    theta = torch.stack(
        [
            torch.stack([extent[:, 1], zero, centre[:, 1]], dim=1),
            torch.stack([zero, extent[:, 0], centre[:, 0]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
