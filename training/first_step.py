"""What the first step of training changes: every setting, from 20 to 110 layers, on real images."""

import platform
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from risotto_zoo.errors import UserError

from .files import write
from .grid import results_file
from .optimization import build_optimizer
from .propagation import some_images
from .recipe import validate
from .run_folder import a_row_a_line

SETTINGS = {
    "RISOTTO": {},
    "RISOTTO, alpha 0.1": {"alpha": 0.1},
    "RISOTTO, one pair rotated": {"rotated_pairs": 1},
    "RISOTTO, one pair rotated, alpha 0.1": {"rotated_pairs": 1, "alpha": 0.1},
    "RISOTTO, projection skips": {"model": "risotto_resnet20_c"},
    "He": {"init": "he"},
    "Fixup": {"init": "fixup"},
    "SkipInit": {"init": "skipinit"},
}
DEPTHS = {20: (3, 3, 3), 56: (9, 9, 9), 110: (18, 18, 18)}
SEEDS = (0, 1, 2)
IMAGES = 128
CLASSES = 10
RATE = 0.003  # the best of ResNet-20's in a few epochs, for kernels and all else
KINDS = {"kernels": "kernels", "vectors": "biases", "ends": "stem and head", "alphas": "alphas"}


def conduct(source: Path) -> None:
    """Measure every setting at every depth, and write results.json.

    Raises:
        UserError: If the images do not suffice, or are of more than ten classes.
    """
    images, targets = some_images(source, True, IMAGES * len(SEEDS))
    if targets.max() >= CLASSES:
        raise UserError(f"{source} has more than the {CLASSES} classes that this study's nets know")
    grid = [(setting, depth) for depth in DEPTHS for setting in SETTINGS]
    rows = []
    for setting, depth in tqdm(grid, "first_step", disable=None):
        measured = [
            measure(SETTINGS[setting], DEPTHS[depth], seed, images[i :: len(SEEDS)], targets[i :: len(SEEDS)])
            for i, seed in enumerate(SEEDS)
        ]
        rows.append({"scheme": setting, "depth": depth, **{key: [m[key] for m in measured] for key in measured[0]}})
    stored = {
        "data": source.absolute().name,
        "images": IMAGES,
        "rate": RATE,
        "seeds": SEEDS,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "rows": rows,
    }
    write(results_file("first_step"), a_row_a_line(stored, "rows"))


def measure(
    setting: dict[str, Any], layers: tuple[int, ...], seed: int, images: Tensor, targets: Tensor
) -> dict[str, float]:
    """Change of the last feature map by the first step of Muon, relative to its norm.

    Args:
        setting: `model` and arguments of timm.create_model, where they are not RISOTTO's on a ResNet of identity skips.
        images: Normalized, shape (B, 3, 32, 32); targets of shape (B,).

    Returns:
        The change by all parameters together ("all") and by each kind of KINDS with the others held still.
    """
    arguments = {"layers": layers, "seed": seed, "num_classes": CLASSES, **setting}
    model = timm.create_model(arguments.pop("model", "risotto_resnet20"), **arguments)
    optimizer = build_optimizer(
        model, validate({"optimizer": {"name": "muon", "lr": RATE, "momentum": 0.95}}, "first_step")
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    features = model.forward_features(images)
    F.cross_entropy(model.forward_head(features), targets).backward()
    optimizer.step()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    kinds = {id(p): group["kind"] for group in optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def change(moved: set[str]) -> float:
        for name, parameter in model.named_parameters():
            parameter.copy_((after if kinds[id(parameter)] in moved else before)[name])
        return ((model.forward_features(images) - features).norm() / features.norm()).item()

    return {"all": change(set(KINDS)), **{kind: change({kind}) for kind in KINDS}}


def section(stored: dict[str, Any]) -> str:
    """The study's part of the report."""
    columns = ["all", *KINDS]
    lines = [
        "## What the first step changes",
        "",
        f"`first_step`. How must the learning rate shrink with depth? One step of Muon, the kernels' rate and that of "
        f"all else {stored['rate']:g}, no warm-up, on {stored['images']} training images of {stored['data']}; nets "
        "without normalization, with identity skips unless it says otherwise. The change is that of the last feature "
        "map, relative to its norm: by all parameters, and by each kind with the others held still. Means of seeds "
        f"{', '.join(map(str, stored['seeds']))}, in brackets the smallest and the largest; {stored['machine']}, torch "
        f"{stored['torch']}.",
        "",
        f"| scheme | layers | {' | '.join(['all', *KINDS.values()])} |",
        "|" + "---|" * (len(columns) + 2),
    ]
    for row in stored["rows"]:
        cells = [f"{statistics.fmean(row[key]):.2f} ({min(row[key]):.2f} to {max(row[key]):.2f})" for key in columns]
        lines.append(f"| {row['scheme']} | {row['depth']} | {' | '.join(cells)} |")
    lines += ["", "![change by depth](first_step/change_by_depth.svg)", "", _finding(stored["rows"]), ""]
    lines.append(
        "Fixup's zeros say nothing of its stability: its classifier starts at zero, so the first step moves that alone."
    )
    return "\n".join(lines)


def _finding(rows: list[dict[str, Any]]) -> str:
    least, most = min(DEPTHS), max(DEPTHS)

    def growth(scheme: str, kind: str) -> float:
        at = {row["depth"]: statistics.fmean(row[kind]) for row in rows if row["scheme"] == scheme}
        return at[most] / at[least]

    told = [
        f"{scheme} changes {growth(scheme, 'kernels'):.1f} times as much by its kernels and "
        f"{growth(scheme, 'vectors'):.1f} times by its biases"
        for scheme in ("RISOTTO", "RISOTTO, one pair rotated, alpha 0.1", "RISOTTO, projection skips", "He")
    ]
    return f"From {least} to {most} layers, which have {most / least:.1f} times the depth, {'; '.join(told)}."


def figures(stored: dict[str, Any]) -> dict[str, Figure]:
    """Change by depth, one line a scheme, one panel for all parameters and one each for kernels and biases."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, key in zip(panels, ("all", "kernels", "vectors"), strict=True):
        for scheme in dict.fromkeys(row["scheme"] for row in stored["rows"]):
            rows = [row for row in stored["rows"] if row["scheme"] == scheme]
            axes.plot([r["depth"] for r in rows], [statistics.fmean(r[key]) for r in rows], ".-", label=scheme)
        axes.set_title(KINDS.get(key, key))
        axes.set_xlabel("layers")
        axes.set_yscale("symlog", linthresh=0.01)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative change of the last map")
    panels[-1].legend(frameon=False, fontsize=7)
    return {"change_by_depth.svg": figure}
