"""Signal propagation at initialization: every scheme, from 20 to 1,202 layers, on real images, without training."""

import math
import platform
import time
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from risotto_zoo.errors import UserError
from risotto_zoo.initializers import SCHEMES
from risotto_zoo.isometry import probed_singular_values, signal_by_block, signal_map
from risotto_zoo.models.variants import own_cfg

from .data import View, load_set, normalized
from .files import write
from .grid import results_file
from .run_folder import a_row_a_line

DEPTHS = {20: (3, 3, 3), 56: (9, 9, 9), 110: (18, 18, 18), 1202: (200, 200, 200)}
IMAGES = 8
PROBES = 32
COLLAPSED = 0.95  # similarity at the last block from which on images count as alike
LABELS = {
    "risotto": "RISOTTO",
    "he": "He",
    "fixup": "Fixup",
    "skipinit": "SkipInit",
    "rezero": "ReZero",
    "orthogonal_delta": "delta-orthogonal",
}


def conduct(source: Path) -> None:
    """Measure every scheme at every depth, and write results.json."""
    images, _ = some_images(source, False, IMAGES)
    grid = [(scheme, depth) for depth in DEPTHS for scheme in SCHEMES]
    start, rows = time.perf_counter(), []
    for scheme, depth in tqdm(grid, "propagation", disable=None):
        rows.append({"scheme": scheme, "depth": depth, **measure(scheme, DEPTHS[depth], images)})
    stored = {
        "data": source.absolute().name,
        "images": IMAGES,
        "probes": PROBES,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "seconds": time.perf_counter() - start,
        "rows": rows,
    }
    write(results_file("propagation"), a_row_a_line(stored, "rows"))


def some_images(source: Path, training: bool, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of different classes, evenly from the whole set: normalized, shape (count, 3, 32, 32), and their targets.

    Raises:
        UserError: If the source is missing or holds fewer readable images.
    """
    view = View.of(own_cfg("risotto_resnet20"))
    held = load_set(str(source), training, view)
    if len(held) < count:
        raise UserError(f"{source} holds {len(held)} readable images of those asked for, but {count} are needed")
    chosen = torch.linspace(0, len(held) - 1, count).long()
    return normalized(held.images[chosen], view), held.targets[chosen]


def measure(scheme: str, layers: tuple[int, ...], images: torch.Tensor) -> dict[str, Any]:
    """Similarity and norm of the signal by block, gradient norm by block, and singular values; float64, seed 0."""
    model = timm.create_model("risotto_resnet20", layers=layers, init=scheme, seed=0, dtype=torch.float64)
    model.eval()
    images = images.double()
    blocks = signal_by_block(model, images)
    values = probed_singular_values(signal_map(model), images[0], PROBES)
    return {
        "similarity": [_number(block.similarity) for block in blocks],
        "activation_similarity": [_number(block.activation_similarity) for block in blocks],
        "norm": [_number(block.norm) for block in blocks],
        "gradient": [_number(value) for value in gradient_by_block(model, images)],
        "singular_values": [_number(value) for value in values.tolist()],
    }


def gradient_by_block(model: torch.nn.Module, images: torch.Tensor) -> list[float]:
    """Norm of the gradient by each block's output of a fixed random functional of the last signal, per image."""
    maps: list[torch.Tensor] = []

    def keep(_block: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        maps.append(output)

    handles = [
        block.register_forward_hook(keep)
        for name, stage in model.named_children()
        if name.startswith("layer")
        for block in stage
    ]
    try:
        signal = signal_map(model)(images)
    finally:
        for handle in handles:
            handle.remove()
    direction = torch.randn(signal.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (signal * direction / direction.norm(dim=1, keepdim=True)).sum().backward()
    return [feature.grad.flatten(1).norm(dim=1).mean().item() for feature in maps]


CLAIM = "RISOTTO keeps different inputs separable at any depth, where other schemes let them collapse."


def verdict(stored: dict[str, Any]) -> str:
    """What came out for the claim, in two sentences."""
    depths = sorted({row["depth"] for row in stored["rows"]})
    spread = max(
        max(row["similarity"]) - min(row["similarity"]) for row in stored["rows"] if row["scheme"] == "risotto"
    )
    deepest = [row for row in stored["rows"] if row["depth"] == depths[-1] and row["scheme"] != "risotto"]
    whole = [row for row in deepest if None not in row["similarity"]]
    collapsed = [row for row in whole if row["similarity"][-1] > COLLAPSED]
    others = [row for row in whole if row not in collapsed]
    stages = [row for row in others if len(set(row["similarity"])) <= 3]  # constant within each of the three stages
    told = [_reaches("against", row) for row in collapsed]
    told += [_reaches("not against", row) for row in others if row not in stages]
    if stages:
        told.append(
            f"not against {', '.join(LABELS[row['scheme']] for row in stages)}, whose similarity rises at the two "
            "projection skips alone, whatever the depth, since every other block starts as its skip"
        )
    how = "Not confirmed"
    if spread < 1e-4 and collapsed:
        how = "Confirmed" if len(collapsed) == len(deepest) else "Confirmed in part"
    return (
        f"{how} at initialization, up to {depths[-1]} layers, {'; '.join(told)}: RISOTTO's similarity moves by less "
        f"than {10.0 ** math.ceil(math.log10(max(spread, 1e-9))):.0e} over all depths; images count as alike from "
        f"{COLLAPSED} on. One seed: this verdict is not one of intervals."
    )


def _reaches(against: str, row: dict[str, Any]) -> str:
    return f"{against} {LABELS[row['scheme']]}, whose similarity reaches {row['similarity'][-1]:.4f}"


def section(stored: dict[str, Any]) -> str:
    """The study's part of the report."""
    lines = [
        "## Signal propagation at initialization",
        "",
        f"`propagation`. Do different images stay different, at any depth? {stored['images']} test images of "
        f"{stored['data']}, nets of three stages with identity skips where shapes allow, no normalization, float64, "
        f"seed 0; {stored['probes']} random probes of the signal's Jacobian; {stored['seconds'] / 60:.1f} min on "
        f"{stored['machine']}, torch {stored['torch']}. Similarity is the mean cosine of the signals of two images, "
        "or of the activations themselves, read at the pixels that reach the last map; gradient is that of a random "
        "functional of the last signal.",
        "",
        "| scheme | layers | similarity of signals, first to last block | of activations | signal norm, last / first "
        "| gradient norm, first / last | singular values |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in stored["rows"]:
        spectrum = _spectrum(row["singular_values"], stored["probes"])
        lines.append(
            f"| {LABELS[row['scheme']]} | {row['depth']} | {_range(row['similarity'])} "
            f"| {_range(row['activation_similarity'])} | {_ratio(row['norm'][-1], row['norm'][0])} "
            f"| {_ratio(row['gradient'][0], row['gradient'][-1])} | {spectrum} |"
        )
    lines += [
        "",
        "![similarity by block](propagation/similarity.svg)",
        "",
        "![spectra](propagation/spectra.svg)",
        "",
        f"**Claim.** {CLAIM}",
        "",
        f"**Verdict.** {verdict(stored)}",
    ]
    return "\n".join(lines)


def figures(stored: dict[str, Any]) -> dict[str, Figure]:
    """Similarity of signals and of activations by block, and spectra; one panel a depth, one line a scheme."""
    depths = sorted({row["depth"] for row in stored["rows"]})
    drawn = {
        "similarity.svg": [("similarity", "cosine of signals"), ("activation_similarity", "cosine of activations")],
        "spectra.svg": [("singular_values", "singular value")],
    }
    result = {}
    for name, rows in drawn.items():
        figure = Figure(figsize=(3.2 * len(depths), 2.8 * len(rows) + 0.4), layout="constrained")
        panels = figure.subplots(len(rows), len(depths), squeeze=False, sharey="row")
        for (key, label), line in zip(rows, panels, strict=True):
            for axes, depth in zip(line, depths, strict=True):
                _draw(axes, [row for row in stored["rows"] if row["depth"] == depth], key)
                axes.set_title(f"{depth} layers")
            line[0].set_ylabel(label)
        panels[0][-1].legend(frameon=False, fontsize=7)
        result[name] = figure
    return result


def _draw(axes: Axes, rows: list[dict[str, Any]], key: str) -> None:
    for row in rows:
        values = [math.nan if value is None else value for value in row[key]]
        axes.plot(range(1, len(values) + 1), values, label=LABELS[row["scheme"]])
    spectrum = key == "singular_values"
    axes.set_xlabel("probe, in descending order" if spectrum else "block")
    axes.set_yscale("log" if spectrum else "linear")
    axes.grid(alpha=0.3)


def _number(value: float) -> float | None:
    """Ten digits are plenty, and no JSON holds an infinity."""
    return float(f"{value:.10g}") if math.isfinite(value) else None


def _spectrum(found: list[float | None], probes: int) -> str:
    values = [value for value in found if value is not None]
    if not values:
        return "not finite"
    kept = "" if len(values) == probes else f"{len(values)} of {probes} above 1e-6 of the largest: "
    return kept + f"{min(values):.3g} to {max(values):.3g}"


def _range(values: list[float | None]) -> str:
    return " to ".join("not finite" if value is None else f"{value:.4f}" for value in (values[0], values[-1]))


def _ratio(a: float | None, b: float | None) -> str:
    return "not finite" if a is None or b is None else (f"{a / b:.3g}" if b else "-")
