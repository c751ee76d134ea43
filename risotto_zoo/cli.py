"""The command `risotto-zoo`: the models, how they propagate signals at initialization, and what they see in images."""

import argparse
import os
import sys
from pathlib import Path

import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .creation import create_model
from .errors import UserError, did_you_mean, exits_cleanly
from .hub import MANIFEST
from .images import UnreadableImage, read_image, readable_suffixes
from .initializers import SCHEMES
from .isometry import BlockSignal, probed_singular_values, signal_by_block, signal_map, singular_values
from .loading import load, predict

PROBES = 64


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="risotto-zoo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    listing = commands.add_parser("list", help="names, sizes and weights of the models")
    listing.add_argument("pattern", nargs="?", default="risotto_*", help="shell pattern of names (default: risotto_*)")

    inspect = commands.add_parser("inspect", help="singular values, norm and similarity at initialization")
    inspect.add_argument("name", help="model name, such as risotto_resnet20")
    inspect.add_argument("--init", default="risotto", help=f"scheme: {', '.join(SCHEMES)} (default: risotto)")
    inspect.add_argument("--alpha", type=float, help="weight of the branches at the start (default: the scheme's)")
    inspect.add_argument("--rotated-pairs", type=int, metavar="N", help="pairs that an identity skip's block rotates")
    inspect.add_argument("--patches", action="store_true", help="strided layers that read every pixel")
    inspect.add_argument("--seed", type=int, default=0, help="seed of weights and random images (default: 0)")
    inspect.add_argument(
        "--image", nargs="+", type=Path, metavar="FILE", help="measure on these images, not on random ones"
    )
    inspect.add_argument(
        "--exact",
        action="store_true",
        help=f"all singular values of large inputs, too, where the default is {PROBES} random probes",
    )
    inspect.add_argument("--output", type=Path, help="the figure (default: NAME-INIT[-alpha=...].png)")

    predict_ = commands.add_parser("predict", help="what a trained model sees in images")
    predict_.add_argument("image", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    bundled = next((name for name, entry in MANIFEST.items() if entry["location"] == "package"), None)
    predict_.add_argument(
        "--model",
        default=bundled,
        required=bundled is None,
        help="a release, hf-hub:ORG/NAME or local-dir:FOLDER (default: %(default)s)",
    )
    predict_.add_argument("--revision", help="branch, tag or commit of the model's Hub repository")
    predict_.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    predict_.add_argument("--top", type=int, default=5, help="classes to print for each image (default: 5)")
    return parser.parse_args()


@exits_cleanly
def main() -> int:
    args = _arguments()
    return {"list": list_models, "inspect": inspect_model, "predict": predict_images}[args.command](args)


def list_models(args: argparse.Namespace) -> int:
    """Print a line for each model that matches the pattern."""
    pattern = args.pattern
    names = timm.list_models(pattern)
    if not names:
        raise UserError(f"no model matches {pattern!r}{did_you_mean(pattern, timm.list_models('risotto_*'))}")
    print(f"{'name':26} {'parameters':>12} {'multiply-adds':>14} {'input':>12}  weights")
    for name in names:
        model = create_model(name, device="meta") if name.startswith("risotto_") else create_model(name).to("meta")
        size = model.default_cfg["input_size"]
        counter = FlopCounterMode(display=False)
        try:
            with counter, torch.no_grad():
                model.eval()(torch.empty(1, *size, device="meta"))
            work = f"{counter.get_total_flops() / 2e9:12.3f} G"
        except Exception:  # a net of timm that torch's counter cannot follow
            work = f"{'-':>14}"
        parameters = sum(p.numel() for p in model.parameters())
        weights = timm.list_pretrained(f"{name}.*") or timm.list_pretrained(name)
        print(
            f"{name:26} {parameters / 1e6:10.2f} M {work} {'x'.join(map(str, size)):>12}  {', '.join(weights) or '-'}",
            flush=True,
        )
    return 0


def predict_images(args: argparse.Namespace) -> int:
    """Print the most probable classes of each image; what cannot be read is named and counted."""
    if args.top < 1:
        raise UserError(f"--top is {args.top}, but at least one class is printed")
    classifier = load(args.model, args.device, args.revision)
    paths = [path for given in args.image for path in _image_files(given)]
    broken = 0
    for path, outcome in predict(classifier, paths):
        if isinstance(outcome, UnreadableImage):
            broken += 1
            print(f"{path}: {outcome}", file=sys.stderr)
            continue
        print(path)
        for share, index in zip(*outcome.topk(min(args.top, len(outcome))), strict=True):
            print(f"  {100 * share:6.2f}%  {classifier.classes[index]}")
    if broken:
        print(f"{broken} of {len(paths)} images could not be read", file=sys.stderr)
    return 2 if broken == len(paths) else 0


def _image_files(path: Path) -> list[Path]:
    """A file itself, or the files in a folder whose names say that they are images."""
    if not os.path.isdir(path):  # unlike Path.is_dir, at ease with names that are too long
        return [path]
    known = readable_suffixes()
    files = sorted(
        file
        for folder, _, names in os.walk(path, onerror=_raise)
        for file in (Path(folder, name) for name in names)
        if file.suffix.lower() in known and (file.is_file() or file.is_symlink())
    )
    if not files:
        raise UserError(f"{path} holds no images (files named .jpg, .png, ...)")
    return files


def _raise(error: OSError) -> None:
    raise error


def inspect_model(args: argparse.Namespace) -> int:
    """Measure a freshly initialized net, print the table and write the figure."""
    if not args.name.startswith("risotto_"):
        create_model(args.name)  # an unknown name is told with the nearest ones
        raise UserError(f"{args.name} is not a model of this zoo; see risotto-zoo list")
    start = {"init": args.init, "alpha": args.alpha, "rotated_pairs": args.rotated_pairs, "seed": args.seed}
    given = [f"{key}={start[key]:g}" for key in ("alpha", "rotated_pairs") if start[key] is not None]
    given += ["patches"] * args.patches
    output = _figure_path(args.output or Path("-".join([args.name, args.init, *given]) + ".png"))
    model = create_model(args.name, **start, patches=args.patches).eval()
    reduction = model.feature_info[-1]["reduction"]
    images = _read(args.image, model) if args.image else _random_images(model, 4 * reduction, args.seed)
    function = signal_map(model)
    if not function(images[:1]).isfinite().all():
        raise UserError(f"{args.name} with init={args.init} overflows: there is no finite signal to measure")
    small = images[0].numel() * model.num_features <= 16 * 16 * 3 * 64
    if args.exact or small:
        values, how = singular_values(function, images[0]), "all"
        values = values[values > 1e-6 * values.max()]  # rounding leaves traces of dimensions that are not kept
    else:
        values, how = probed_singular_values(function, images[0], PROBES), f"{PROBES} random probes of the"
    blocks = signal_by_block(model, images, whole_maps=args.patches)

    what = f"{', '.join([args.name, f'init={args.init}', *given])}, {'x'.join(map(str, images.shape[1:]))} images"
    print(what)
    print(
        f"signal Jacobian, {how} non-zero singular values: {len(values)} from {values.min():.6g} to {values.max():.6g}"
    )
    print(f"largest distance from 1: {(values - 1).abs().max():.3g}")
    print(f"\n{'block':12} {'signal norm':>12} {'similarity':>11}")
    for block in _thinned(blocks, 24):
        print(f"{block.name:12} {block.norm:12.5g} {block.similarity:11.6f}")
    try:
        _plot(values, blocks, what).savefig(output, dpi=120)
    except OSError as error:
        raise UserError(f"figure {output} cannot be written: {error.strerror or error}") from None
    print(f"\nfigure: {output}")
    return 0


def _figure_path(output: Path) -> Path:
    """Where the figure goes, refused before anything is measured if it cannot go there."""
    if output.is_dir():
        raise UserError(f"figure {output} is a folder; name a file, such as {output / 'figure.png'}")
    output = output if output.suffix else output.with_suffix(".png")
    if not output.parent.is_dir():
        raise UserError(f"figure {output} cannot be written: there is no folder {output.parent}")
    if output.suffix[1:].lower() not in FigureCanvasAgg.get_supported_filetypes():
        raise UserError(f"figure {output}: a figure is a .png, .svg or .pdf file, not {output.suffix}")
    return output


def _random_images(model: nn.Module, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, model.in_chans, size, size, generator=generator)


def _read(paths: list[Path], model: nn.Module) -> Tensor:
    """The images as the model sees them; a single one is compared with its mirror image."""
    transform = create_transform(**resolve_data_config(model=model, verbose=False))
    images = []
    for path in paths:
        try:
            images.append(transform(read_image(path, model.in_chans)))
        except UnreadableImage as error:
            raise UserError(f"image {path}: {error}") from None
    return torch.stack(images if len(images) > 1 else [images[0], images[0].flip(-1)])


def _thinned(blocks: list[BlockSignal], count: int) -> list[BlockSignal]:
    step = max(1, -(-len(blocks) // count))
    kept = blocks[::step]
    return kept if kept[-1] is blocks[-1] else [*kept, blocks[-1]]


def _plot(values: Tensor, blocks: list[BlockSignal], title: str) -> Figure:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    spectrum, norm, similarity = figure.subplots(1, 3)
    depth = range(1, len(blocks) + 1)
    spectrum.semilogy(range(1, len(values) + 1), values, ".")
    if values.max() < 10 * values.min():  # otherwise a flat line would be drawn at the scale of its rounding errors
        spectrum.set_ylim(0.1, 10)
    spectrum.set(xlabel="index", ylabel="singular value", title="Signal Jacobian")
    norm.semilogy(depth, [block.norm for block in blocks], ".-")
    norms = [block.norm for block in blocks]
    if max(norms) < 10 * min(norms):
        norm.set_ylim(min(norms) / 10, max(norms) * 10)
    norm.set(xlabel="block", ylabel="root mean square", title="Signal norm")
    similarity.plot(depth, [block.similarity for block in blocks], ".-")
    similarity.set(xlabel="block", ylabel="cosine similarity", ylim=(-1.05, 1.05), title="Similarity of images")
    for axis in (spectrum, norm, similarity):
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return figure


if __name__ == "__main__":
    main()
