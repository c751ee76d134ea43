"""How timm's Muon does its arithmetic: in which number format, and several kernels at once.

timm has options for neither, so both replace functions of its module; which ones, the recipe and the device decide.
"""

from collections import defaultdict
from functools import partial
from typing import Any

import timm.optim.muon as timm_muon
import torch
from torch import Tensor

_orthogonalized = timm_muon.zeropower_via_newtonschulz
_one_by_one = timm_muon.muon


def set_up_muon(device: torch.device, amp: str | None) -> None:
    """Number format of the Newton-Schulz iteration, and one call of it for all kernels of a shape on a GPU.

    On CPUs the iteration runs in the number format of the training steps. timm takes bfloat16, which is eight times
    slower than float32 on a CPU that emulates it, 1.7 times on an Intel Xeon that has it but no AMX, and three times as
    fast on an AMD EPYC or an Intel Xeon with AMX: for the same reasons and on the same machines as it is slower or
    faster for the rest of the step. What decides is the recipe, not the machine, so that a seed gives one result.
    """
    single = device.type == "cpu" and amp != "bfloat16"
    dtype = torch.float32 if single else torch.bfloat16
    timm_muon.zeropower_via_newtonschulz = partial(_orthogonalized, dtype=dtype)
    timm_muon.muon = by_shape if device.type == "cuda" else _one_by_one


def by_shape(params: list[Tensor], grads: list[Tensor], momentum_bufs: list[Tensor], **settings: Any) -> None:
    """`timm.optim.muon.muon` with kernels of one shape stacked; the same numbers but for rounding.

    A step of a small net on a GPU takes as long as its launches, and most of them were the single iterations'.
    """
    if settings["conv_mode"] != "flatten":
        return _one_by_one(params, grads, momentum_bufs, **settings)
    lr, momentum = settings["lr"], settings["momentum"]
    torch._foreach_mul_(params, 1 - lr * settings["weight_decay"])
    torch._foreach_lerp_(momentum_bufs, grads, 1 - momentum)
    updates = torch._foreach_lerp(grads, momentum_bufs, momentum) if settings["nesterov"] else momentum_bufs
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for i, param in enumerate(params):
        alike[param.shape].append(i)
    coefficients = timm_muon.resolve_ns_coefficients(settings["ns_coefficients"], timm_muon._COEFFICIENTS)
    options = {key: settings[key] for key in ("eps", "safety_factor", "scale_eps") if key in settings}
    for shape, indices in alike.items():
        matrices = torch.stack([updates[i].flatten(1) for i in indices])
        rate = -lr
        if settings["adjust_lr_fn"]:
            rate = rate * timm_muon.get_lr_scale(matrices.shape[1:], settings["adjust_lr_fn"])
        orthogonal = timm_muon.zeropower_via_newtonschulz(matrices, settings["ns_steps"], coefficients, **options)
        changes = orthogonal.float() * rate
        torch._foreach_add_([params[i] for i in indices], [change.view(shape) for change in changes])
