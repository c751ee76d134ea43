"""A training step as one CUDA graph: what launches thousands of small kernels becomes a single launch."""

from collections.abc import Callable

import torch
from torch import Tensor

from risotto_zoo.errors import UserError

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

TINY = 1e-12  # in place of a rate of 0, by which timm's NAdamW divided before 1.0.31
WARMUP = 3  # steps before the capture, in which cuDNN chooses its kernels and the optimizer makes its state


class GraphedStep:
    """`step`, an optimizer step on images and targets of fixed shapes, captured once and then replayed.

    The learning rates, which the schedule sets as numbers, are read from tensors that each call fills. The tensors
    returned are overwritten by the next call.

    Args:
        step: Forward, backward and update; it must not wait for the device. Called WARMUP times before it is captured,
            on a stream of its own, as ordinary steps.
        optimizer: The one that `step` steps, made with `capturable=True`.

    Raises:
        UserError: On the call that captures, if the step cannot be.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        self.step, self.optimizer = step, optimizer
        device = optimizer.param_groups[0]["params"][0].device
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        groups = self.optimizer.param_groups
        for rate, group in zip(self.rates, groups, strict=True):
            rate.fill_(max(group["lr"], TINY))
        if self.graph is None:
            numbers = [group["lr"] for group in groups]
            for rate, group in zip(self.rates, groups, strict=True):
                group["lr"] = rate
            try:
                if self.calls < WARMUP:
                    self.calls += 1
                    return self._uncaptured(images, targets)
                self._capture(images, targets)
            finally:
                for number, group in zip(numbers, groups, strict=True):
                    group["lr"] = number
        self.images.copy_(images)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.outputs

    def _uncaptured(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.step(images, targets)
        current.wait_stream(self.stream)
        return outputs

    def _capture(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images.clone(), targets.clone()
        self.graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: a loader's thread may pin memory meanwhile.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.step(self.images, self.targets)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"cuda_graph: a step of this net or optimizer cannot be captured ({reason}); set cuda_graph=false"
            ) from None
