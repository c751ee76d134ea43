"""Accuracy on a set of labelled images, with its uncertainty. Imports torch only."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """What a model did on one set. Accuracies are shares of 1, intervals are 95% Wilson intervals."""

    images: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]
    loss: float  # mean cross-entropy, nats
    images_per_second: float


def wilson_interval(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson 1927); (0, 1) for no trials."""
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Evaluation:
    """Evaluate a classifier in evaluation mode, without TensorFloat-32; the model's own mode is put back.

    Args:
        model: Maps images (B, C, H, W) to logits (B, K).
        batches: Images and class indices (B,), on the model's device.
        total: Sums the counters over processes, in place; nothing to do for one.

    Raises:
        ValueError: If there is no image at all.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    tf32 = [switch.allow_tf32 for switch in switches]
    for switch in switches:  # float32 in full, so that everybody's numbers are the same
        switch.allow_tf32 = False
    counts = torch.zeros(4, dtype=torch.float64)  # images, correct, correct in five, loss
    start = time.perf_counter()
    for images, targets in batches:
        logits = model(images).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == targets[:, None]
        losses = F.cross_entropy(logits, targets, reduction="none").cpu().double()
        counts += torch.stack([torch.tensor(len(targets)), hits[:, 0].sum().cpu(), hits.sum().cpu(), losses.sum()])
    model.train(was_training)
    for switch, value in zip(switches, tf32, strict=True):
        switch.allow_tf32 = value
    seconds = time.perf_counter() - start
    counts = total(counts.to(device)).cpu() if device.type == "cuda" else total(counts)  # NCCL sums on the device
    images = int(counts[0])
    if images == 0:
        raise ValueError("there are no images to evaluate on")
    top1, top5 = int(counts[1]), int(counts[2])
    return Evaluation(
        images=images,
        top1=top1 / images,
        top1_interval=wilson_interval(top1, images),
        top5=top5 / images,
        top5_interval=wilson_interval(top5, images),
        loss=counts[3].item() / images,
        images_per_second=images / seconds,
    )
