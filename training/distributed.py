"""The little that training needs to know of other processes. Started by torchrun, or alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from risotto_zoo.errors import UserError

PATIENCE = timedelta(hours=1)  # that the others have while the first one decodes the images


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest of a small number over processes."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensor of every process, by rank; all have one shape."""
        if self.size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return parts

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join_world(device: str | None) -> World:
    """Join the process group that torchrun describes, or be alone; choose this process's device.

    Raises:
        UserError: If the device is unknown or not there.
    """
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if size > 1 and (device or "cuda").startswith("cuda") and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} has no GPU: this machine has {torch.cuda.device_count()}")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)  # before anything touches a device: a context on the first one stays there
    else:
        chosen = choose_device(device)
    if size > 1:
        store, rank, size = next(rendezvous("env://"))
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:
            # Restarted processes find the same store again, and in it the addresses of those that died. On several
            # machines each torchrun has a count of its own; there every attempt needs a new store (see the README).
            store = dist.PrefixStore(f"attempt-{_restarts()}", store)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        return World(dist.get_rank(), dist.get_world_size(), chosen)
    return World(0, 1, chosen)


def launched() -> float | None:
    """When torchrun was started, in seconds since 1970, if this may be another attempt than its first one."""
    if _restarts() == 0 and int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:
        return None
    return psutil.Process(os.getppid()).create_time()


def _restarts() -> int:
    """How often this machine's torchrun has restarted its processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def leave_world() -> None:
    if dist.is_initialized():
        with suppress(RuntimeError):  # one that a signal has ended
            dist.barrier()  # in torch 2.6 the last to leave may wait for the others forever
        dist.destroy_process_group()


def choose_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one.

    Raises:
        UserError: If torch does not know the device or this machine has none of it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # what asks for the current device means this one
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r} is not available on this machine; --device cpu always is") from None
    return device


@contextmanager
def compiling(wanted: bool) -> Iterator[None]:
    """A compiler that is missing or fails, in one line; torch looks for it when a compiled net first runs.

    Raises:
        UserError: If it is so.
    """
    if not wanted:
        yield
        return
    from torch._dynamo.exc import BackendCompilerFailed  # a second that others need not spend

    try:
        yield
    except BackendCompilerFailed as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"compile: this machine cannot compile the model ({reason}); run it without") from None


def cores() -> int:
    """What this process may use of a CPU."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
