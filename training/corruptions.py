"""Damage to images for robustness, at five strengths: noise, blur, JPEG, contrast, occlusion."""

from collections.abc import Callable
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
STRENGTHS = 5


def noise(images: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Gaussian, of a standard deviation from 4% to 26% of the range."""
    deviation = 255 * (0.04, 0.08, 0.12, 0.18, 0.26)[strength]
    drawn = torch.randn(images.shape, generator=generator)
    return (images.float() + deviation * drawn).round().clamp(0, 255).byte()


def blur(images: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Gaussian, of a deviation from 1% to 6% of the image's side; from 0.4 to 0.8 pixels where that is less."""
    sigma = max(0.4 + 0.1 * strength, images.shape[-1] * (0.01, 0.02, 0.03, 0.045, 0.06)[strength])
    size = 2 * max(1, round(2 * sigma)) + 1
    return F.gaussian_blur(images, [size, size], [sigma, sigma])


def jpeg(images: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Compression at quality 60 down to 7."""
    quality = (60, 40, 25, 15, 7)[strength]
    compressed = []
    for image in images:
        F.to_pil_image(image).save(file := BytesIO(), "JPEG", quality=quality)
        compressed.append(F.pil_to_tensor(Image.open(file)))
    return torch.stack(compressed)


def contrast(images: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Reduced to 70% down to 10%, about each image's mean."""
    factor = (0.7, 0.5, 0.35, 0.2, 0.1)[strength]
    mean = images.float().mean(dim=(1, 2, 3), keepdim=True)
    return (mean + factor * (images.float() - mean)).round().clamp(0, 255).byte()


def occlusion(images: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """A grey square over 4% to 49% of the area, anywhere."""
    side = images.shape[-1]
    square = max(1, round(side * (0.2, 0.3, 0.4, 0.55, 0.7)[strength]))
    corners = torch.randint(side - square + 1, (len(images), 2), generator=generator).tolist()
    result = images.clone()
    for image, (top, left) in zip(result, corners, strict=True):
        image[:, top : top + square, left : left + square] = 127
    return result


CORRUPTIONS: dict[str, Corruption] = {
    "noise": noise,
    "blur": blur,
    "jpeg": jpeg,
    "contrast": contrast,
    "occlusion": occlusion,
}
