"""A released model, ready to use: the net in evaluation mode, the transform of its images, the names of its classes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision.transforms import Compose

from .creation import create_model, parse_name
from .errors import UserError
from .hub import MANIFEST, repository
from .images import UnreadableImage, read_image, to_mode

BATCH = 64


@dataclass(frozen=True)
class Classifier:
    """What `load` returns."""

    model: nn.Module  # images (B, C, H, W) to logits (B, K), in evaluation mode
    transform: Compose  # a PIL image in mode RGB, or L for a model of one channel, to a tensor (C, H, W)
    classes: list[str]  # K names, those for people where the labels are ids
    channels: int

    def __call__(self, images: list[Image.Image]) -> Tensor:
        """Probabilities of the classes, shape (B, K) on the CPU, for PIL images of any mode and size."""
        return self.probabilities(torch.stack([self.transform(to_mode(image, self.channels)) for image in images]))

    @torch.no_grad()
    def probabilities(self, batch: Tensor) -> Tensor:
        """The same for transformed images, shape (B, C, H, W)."""
        parameter = next(self.model.parameters())
        return self.model(batch.to(parameter)).float().softmax(dim=1).cpu()


def load(name: str, device: str | torch.device = "cpu", revision: str | None = None) -> Classifier:
    """Load a trained model with everything that using it takes.

    Args:
        name: A release such as 'risotto_resnet20.cifar10-jpeg' (without the tag: the default one), hf-hub:ORG/NAME,
            local-dir:FOLDER, or any other model with weights that timm knows.
        device: Where the model goes.
        revision: Branch, tag or commit of the Hub repository, for releases and hf-hub names.

    Raises:
        UserError: If there is no such model, it cannot be reached, its weights do not verify, or it has no classes.
    """
    if revision is not None:
        source, place = parse_name(name)
        if source == "hf-hub":
            name = f"hf-hub:{place.partition('@')[0]}@{revision}"
        elif revision != MANIFEST[release := _release(name)]["revision"]:
            name = f"hf-hub:{repository(release)}@{revision}"
    model = create_model(name, pretrained=True).eval()
    try:
        next(model.to(device).parameters()).sum().item()  # 'meta' takes a model, too, but computes nothing
    except Exception as error:  # each backend has its own way to say that it is not there
        raise UserError(f"device {device}: {str(error).splitlines()[0]}") from None
    if not getattr(model, "num_classes", 0):
        raise UserError(f"{name} is no classifier: it has no classes")
    try:
        data = resolve_data_config(model=model, verbose=False)
        transform = create_transform(**data)
        told = model.pretrained_cfg.get("label_descriptions") or {}
        labels = [
            told.get(label, str(label)) for label in model.pretrained_cfg.get("label_names") or range(model.num_classes)
        ]
        channels = int(data["input_size"][0])
        if channels in (1, 3):
            transform(Image.new("L" if channels == 1 else "RGB", (8, 8)))
    except Exception as error:  # whatever a configuration from elsewhere may hold
        raise UserError(f"{name}: its config.json does not say how to prepare images: {error!r}") from None
    if channels not in (1, 3):
        raise UserError(f"{name} takes images of {channels} channels, but only grey (1) and RGB (3) ones are read")
    if len(labels) != model.num_classes:
        raise UserError(f"{name}: its config.json has {len(labels)} label names for {model.num_classes} classes")
    return Classifier(model, transform, labels, channels)


def predict(classifier: Classifier, paths: list[Path]) -> Iterator[tuple[Path, Tensor | UnreadableImage]]:
    """Probabilities (K,) of each image file in turn, or why it cannot be read."""
    for start in range(0, len(paths), BATCH):
        part = paths[start : start + BATCH]
        images: dict[Path, Tensor] = {}
        broken: dict[Path, UnreadableImage] = {}
        for path in part:
            try:
                images[path] = classifier.transform(read_image(path, classifier.channels))
            except UnreadableImage as error:
                broken[path] = error
        rows = {}
        if images:
            rows = dict(zip(images, classifier.probabilities(torch.stack(list(images.values()))), strict=True))
        for path in part:
            yield path, rows[path] if path in rows else broken[path]


def _release(name: str) -> str:
    """The full name of a release: the default tag added where none is given."""
    matches = [key for key in MANIFEST if key == name or key.partition(".")[0] == name]
    if not matches:
        raise UserError(f"{name} is no release, so it has no revisions; released are: {', '.join(MANIFEST) or 'none'}")
    return matches[0]
