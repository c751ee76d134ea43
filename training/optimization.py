"""Optimizer, schedule and reparametrization of a recipe, from timm's parts."""

from functools import partial

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.utils import parametrize

from risotto_zoo.errors import UserError

from .muon import set_up_muon
from .recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe, capturable: bool = False) -> torch.optim.Optimizer:
    """The recipe's optimizer on four kinds of parameters: kernels, stem and head, one-dimensional ones, alphas.

    Muon, under each of its names, orthogonalizes the updates of the kernels and leaves the other three kinds to its
    AdamW, with Nesterov momentum (NAdamW) if Muon itself has it, as `muon` has here; weight decay never touches the
    last two. With `layer_decay` the kinds give way to timm's layer-wise groups. `capturable` makes one whose step can
    be part of a CUDA graph.

    Raises:
        UserError: If the optimizer refuses an option, or cannot be captured.
    """
    settings = recipe.optimizer
    groups = _layer_groups(model, recipe) if settings.layer_decay is not None else _kinds(model, recipe)
    options = dict(settings.options)
    if settings.name == "muon":
        options.setdefault("nesterov", True)
    if _is_muon(settings.name):
        set_up_muon(next(model.parameters()).device, recipe.amp)
    shared = {"opt": settings.name, "lr": settings.lr, "weight_decay": 0.0, "momentum": settings.momentum, **options}
    try:
        _take_a_step(create_optimizer_v2(_samples(groups), **shared))
        optimizer = create_optimizer_v2(groups, **shared)
    except Exception as error:  # a hundred optimizers, each refusing in its own way
        raise UserError(f"optimizer {settings.name}: {str(error) or type(error).__name__}") from None
    if settings.centralize:
        stem = _first(model, "first_conv")
        kernels = [p for name, p in model.named_parameters() if p.ndim == 4 and name != f"{stem}.weight"]
        optimizer.register_step_pre_hook(partial(_centralize, kernels))
    if capturable:
        if "capturable" not in optimizer.defaults:
            raise UserError(f"cuda_graph: {settings.name} cannot be part of a CUDA graph; set cuda_graph=false")
        for group in (optimizer.defaults, *optimizer.param_groups):
            group["capturable"] = True
    return optimizer


def _is_muon(name: str) -> bool:
    """timm has four names for its one class: muon, nmuon, adamuon and nadamuon."""
    return name.endswith("muon")


@torch.no_grad()
def _centralize(kernels: list[nn.Parameter], *_: object) -> None:
    """Gradient centralization (Yong et al., arXiv 2004.01461).

    SGD and Muon then leave each channel's sum over its kernel as it is. The maps that come in are positive, so that sum
    moves a channel's mean, on which it depends whether ReLU passes anything on.
    """
    for kernel in kernels:
        if kernel.grad is not None:
            kernel.grad -= kernel.grad.mean(dim=(1, 2, 3), keepdim=True)


def _samples(groups: list[dict]) -> list[dict]:
    """The groups with a copy of their first parameter alone."""
    return [{**group, "params": [group["params"][0].detach().clone().requires_grad_()]} for group in groups]


def _take_a_step(optimizer: torch.optim.Optimizer) -> None:
    """Some options are looked at only now."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _kinds(model: nn.Module, recipe: Recipe) -> list[dict]:
    settings = recipe.optimizer.filled()
    ends, undecayed = _ends(model), _undecayed(model)
    kinds: dict[str, list[nn.Parameter]] = {"kernels": [], "ends": [], "vectors": [], "alphas": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("alpha"):
            kind = "alphas"
        # original1: the gains of weight standardization
        elif parameter.ndim <= 1 or name in undecayed or name.endswith(".original1"):
            kind = "vectors"
        else:
            kind = "ends" if name.startswith(ends) else "kernels"
        kinds[kind].append(parameter)
    other_lr = settings.other_lr
    rates = {"kernels": settings.lr, "ends": other_lr, "vectors": other_lr, "alphas": settings.alpha_lr}
    decays = {"kernels": settings.weight_decay, "ends": settings.other_weight_decay}
    groups = []
    for kind, parameters in kinds.items():
        group = {"kind": kind, "params": parameters, "lr": rates[kind], "weight_decay": decays.get(kind, 0.0)}
        if _is_muon(settings.name) and kind != "kernels":
            group["use_fallback"] = True
        if parameters:
            groups.append(group)
    return groups


def _layer_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    settings = recipe.optimizer
    groups = param_groups_layer_decay(
        model, settings.weight_decay, no_weight_decay_list=_undecayed(model), layer_decay=settings.layer_decay
    )
    if _is_muon(settings.name):
        ends = {id(parameter) for name, parameter in model.named_parameters() if name.startswith(_ends(model))}
        for group in groups:
            group["use_fallback"] = any(p.ndim != 4 or id(p) in ends for p in group["params"])
    return [{**group, "lr": settings.lr} for group in groups]


def _undecayed(model: nn.Module) -> set[str]:
    """What timm says of a net's parameters that are no vectors and do not decay either, such as a ViT's tokens."""
    return getattr(model, "no_weight_decay", set)()


def _ends(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of the stem's first convolution and the classifier."""
    return tuple(f"{name}." for name in (_first(model, "first_conv"), _first(model, "classifier")) if name)


def _first(model: nn.Module, key: str) -> str | None:
    value = getattr(model, "pretrained_cfg", {}).get(key)
    return value[0] if isinstance(value, (tuple, list)) else value


def build_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> Scheduler:
    """Learning rate by optimizer step: linear warm-up from 0, then the schedule's way to 0 at the last step."""
    total = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    common = {"warmup_t": warmup, "warmup_prefix": False, "t_in_epochs": False, "t_initial": total}
    if recipe.schedule == "cosine":
        return CosineLRScheduler(optimizer, **common)
    return PolyLRScheduler(optimizer, power=1.0 if recipe.schedule == "linear" else 0.0, **common)


class ScaledStandardization(nn.Module):
    """Kernel = gain * (v - mean(v)) / |v - mean(v)| + m, the mean and norm over each output channel's fan-in.

    Scaled weight standardization (Brock et al., arXiv 2101.08692) with one addition: m, a constant, is the mean of the
    initial kernel. The paper's m = 0 would move identity-skip blocks off their exact start, because their rows do not
    sum to zero; with it the effective kernels start as the initial ones for every scheme.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", weight.detach().flatten(1).mean(dim=1, keepdim=True))

    def forward(self, v: Tensor, gain: Tensor) -> Tensor:
        flat = v.flatten(1)
        centred = flat - flat.mean(dim=1, keepdim=True)
        norm = centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return (gain * centred / norm + self.mean).view_as(v)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        flat = weight.flatten(1)
        gain = (flat - flat.mean(dim=1, keepdim=True)).norm(dim=1, keepdim=True)
        # A row of equal values has no direction, and with gain 0 no gradient would ever give it one.
        direction = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(flat)
        return torch.where(gain > 0, flat, direction).view_as(weight), gain


def standardize(model: nn.Module) -> None:
    """Reparametrize every convolution but the stem's in place; the net computes what it did before."""
    stem = _first(model, "first_conv")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name != stem:
            parametrize.register_parametrization(module, "weight", ScaledStandardization(module.weight))


@torch.no_grad()
def folded_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain net that computes the same: effective kernels in place of their parametrizations."""
    state = {key: value for key, value in model.state_dict().items() if ".parametrizations." not in key}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            state[f"{name}.weight"] = module.weight
    return state


def freeze(model: nn.Module, parts: int) -> None:
    """Keep the first `parts` groups of the model (timm's group_matcher: stem, stages, head) as they are."""
    groups = group_parameters(model, model.group_matcher(coarse=True))
    if parts >= len(groups):
        raise UserError(f"freeze {parts} would leave nothing to train: the model has {len(groups)} parts")
    frozen = {name for group in sorted(groups)[:parts] for name in groups[group]}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
