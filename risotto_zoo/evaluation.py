"""What a classifier does on labelled images: accuracy with its uncertainty, calibration, comparisons. torch only."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NO_IMAGES = "there are no images to evaluate on"


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


@dataclass(frozen=True)
class Outcomes:
    """What a model said of each image, in the order of the images; tensors of shape (N,) on the CPU."""

    targets: Tensor
    predicted: Tensor
    confidence: Tensor  # probability of the predicted class
    in_five: Tensor  # whether the target is among the five most probable classes
    losses: Tensor  # cross-entropy, nats
    classes: int
    seconds: float

    @property
    def correct(self) -> Tensor:
        return self.predicted == self.targets


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson 1927); (0, 1) for no trials."""
    if total == 0:
        return 0.0, 1.0
    z = 1.959963984540054  # the normal distribution holds 95% within so many deviations
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 in full, without TensorFloat-32, so that everybody's numbers are the same; then as it was before."""
    matmul, cudnn, mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; it refuses to be asked by the older names after that
        switches = (matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)
        before = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = "ieee"
    else:
        before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
    try:
        yield
    finally:
        if hasattr(matmul, "fp32_precision"):
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value
        else:
            torch.set_float32_matmul_precision(before[0])
            cudnn.allow_tf32 = before[1]


@torch.no_grad()
def observe(
    model: nn.Module | Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    amp: torch.dtype | None = None,
) -> Outcomes:
    """Run a classifier over labelled images in evaluation mode, without TensorFloat-32; its own mode is put back.

    Args:
        model: Maps images (B, C, H, W) to logits (B, K).
        batches: Images and class indices (B,), on the model's device.
        amp: Autocast to this dtype; float32 if None.
    """
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    if isinstance(model, nn.Module):
        model.eval()
    parts: list[tuple[Tensor, ...]] = []
    classes = 0
    start = time.perf_counter()
    try:
        with full_precision():
            for images, targets in batches:
                with torch.autocast(images.device.type, amp) if amp is not None else nullcontext():
                    logits = model(images)
                logits = logits.float()
                classes = logits.shape[1]
                shares, best = logits.softmax(dim=1).topk(min(5, classes), dim=1)
                losses = F.cross_entropy(logits, targets, reduction="none")
                hits = (best == targets[:, None]).any(dim=1)
                parts.append(tuple(part.cpu() for part in (targets, best[:, 0], shares[:, 0], hits, losses)))
    finally:
        for module, training in modes.items():  # one by one: some may have been frozen
            module.training = training
    if not parts:  # one of several processes may have none
        none = torch.zeros(0, dtype=torch.long, device="cpu")
        parts.append((none, none, none.float(), none.bool(), none.float()))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return Outcomes(*columns, classes=classes, seconds=time.perf_counter() - start)


@contextmanager
def channel_activity(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """How often the channels of each nn.ReLU are active while the model runs in the context.

    Yields:
        Shares of all images and positions, shape (C,) where C is the second dimension of what comes out, by the
        module's name, with '#2' and so on for a module that a pass calls again; filled when the context ends.
    """
    calls: Counter[str] = Counter()
    counts: dict[str, Tensor] = {}
    positions: dict[str, int] = {}
    shares: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def note(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            active = (output > 0).transpose(0, 1).flatten(1)
            calls[name] += 1
            layer = name if calls[name] == 1 else f"{name}#{calls[name]}"
            counts[layer] = counts.get(layer, 0) + active.sum(dim=1)
            positions[layer] = positions.get(layer, 0) + active.shape[1]

        return note

    relus = {name: module for name, module in model.named_modules() if isinstance(module, nn.ReLU)}
    handles = [module.register_forward_hook(watch(name)) for name, module in relus.items()]
    handles.append(model.register_forward_pre_hook(lambda *_: calls.clear()))
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()
        shares |= {layer: count.double().cpu() / positions[layer] for layer, count in counts.items()}


def summarize(outcomes: Outcomes, total: Callable[[Tensor], Tensor] = lambda counts: counts) -> Evaluation:
    """Accuracy and loss of what was observed; `total` sums the counters over processes, in place.

    Raises:
        ValueError: If there is no image at all.
    """
    sums = (outcomes.correct.sum(), outcomes.in_five.sum(), outcomes.losses.double().sum())
    count = torch.tensor(float(len(outcomes.targets)), device="cpu")
    counts = torch.stack([count, *(value.double() for value in sums)])
    images, top1, top5, loss = total(counts.double()).tolist()
    images, top1, top5 = round(images), round(top1), round(top5)
    if images == 0:
        raise ValueError(_NO_IMAGES)
    return Evaluation(
        images=images,
        top1=top1 / images,
        top1_interval=wilson_interval(top1, images),
        top5=top5 / images,
        top5_interval=wilson_interval(top5, images),
        loss=loss / images,
        images_per_second=images / outcomes.seconds,
    )


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Evaluation:
    """`summarize` of `observe`, over all processes if `total` sums counters over them.

    Args:
        model: On any device.
        batches: Normalized images, (B, C, H, W), and class indices, (B,), on the model's device.
        total: Sums float64 counters, shape (4,), over processes; this process's own if left out.
    Raises:
        ValueError: If there is no image at all.
    """
    device = next(model.parameters()).device

    def over_processes(counts: Tensor) -> Tensor:  # NCCL sums on the device
        return total(counts.to(device)).cpu() if device.type == "cuda" else total(counts)

    return summarize(observe(model, batches), over_processes)


def _require_images(outcomes: Outcomes) -> None:
    if not len(outcomes.targets):
        raise ValueError(_NO_IMAGES)


def per_class(outcomes: Outcomes) -> list[tuple[int, float]]:
    """Number of images and top-1 accuracy of each class; nan for a class without images."""
    counts = torch.bincount(outcomes.targets, minlength=outcomes.classes)
    correct = torch.bincount(outcomes.targets[outcomes.correct], minlength=outcomes.classes)
    shares = (correct.double() / counts).tolist()
    return list(zip(counts.tolist(), shares, strict=True))


def confusion(outcomes: Outcomes) -> Tensor:
    """Counts, shape (K, K): row the true class, column the predicted one."""
    index = outcomes.targets * outcomes.classes + outcomes.predicted
    return torch.bincount(index, minlength=outcomes.classes**2).view(outcomes.classes, outcomes.classes)


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy in equal-width bins of confidence, each bin closed above."""

    error: float  # expected calibration error (Guo et al., arXiv 1706.04599)
    counts: list[int]
    confidence: list[float]  # mean in each bin, nan where it is empty
    accuracy: list[float]


def calibration(outcomes: Outcomes, bins: int = 15) -> Calibration:
    """How far confidence is from accuracy, in `bins` of equal width.

    Raises:
        ValueError: If there is no image at all.
    """
    _require_images(outcomes)
    confidence, correct = outcomes.confidence.double(), outcomes.correct.double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(which, minlength=bins)
    sums = [value.new_zeros(bins).index_add_(0, which, value) for value in (confidence, correct)]
    means = [total / counts for total in sums]
    error = (sums[0] - sums[1]).abs().sum().item() / len(confidence)
    return Calibration(error, counts.tolist(), means[0].tolist(), means[1].tolist())


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images."""

    difference: float  # top-1 of the first minus that of the second
    interval: tuple[float, float]  # 95%, bootstrap over images
    only_first: int  # images that only the first gets right
    only_second: int
    p: float  # McNemar's exact test of equal accuracy


def compare(first: Outcomes, second: Outcomes, samples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare two models on the same images, paired.

    The bootstrap draws the numbers of images that only one model gets right from their multinomial distribution, which
    is what resampling the images does.

    Args:
        first, second: Both models' outcomes, image by image in one order.
        samples: Of the bootstrap.
        seed: Of the bootstrap.
    Raises:
        ValueError: If they were not observed on the same images, or on none.
    """
    _require_images(first)
    if not torch.equal(first.targets, second.targets):
        raise ValueError("the two models did not see the same images")
    total = len(first.targets)
    a = int((first.correct & ~second.correct).sum())
    b = int((second.correct & ~first.correct).sum())
    generator = torch.Generator().manual_seed(seed)
    trials = torch.full((samples,), float(total), dtype=torch.float64, device="cpu")
    drawn_a = torch.binomial(trials, torch.full_like(trials, a / total), generator=generator)
    left = 0.0 if a == total else b / (total - a)
    drawn_b = torch.binomial(trials - drawn_a, torch.full_like(trials, left), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")
    low, high = ((drawn_a - drawn_b) / total).quantile(ends).tolist()
    return Comparison((a - b) / total, (low, high), a, b, _mcnemar(a, b))


def _mcnemar(a: int, b: int) -> float:
    """Two-sided exact p: how probable a split of a + b disagreements at least as uneven is for a fair coin."""
    n, k = a + b, min(a, b)
    log_half = n * math.log(0.5)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + log_half) for i in range(k + 1)
    )
    return min(1.0, 2 * tail)
