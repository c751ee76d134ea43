"""Evaluate a model on labelled images: python -m training.evaluate local-dir:runs/digits"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from timm.data import resolve_data_config
from tqdm import tqdm

from risotto_zoo.errors import UserError, exits_cleanly
from risotto_zoo.evaluation import evaluate
from risotto_zoo.models import create_model

from .data import ImageSet, View, load_set
from .distributed import World, choose_device
from .pipelines import EVAL_BATCH, validation_batches, validation_set
from .recipe import Data, load_recipe


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("model", help="a model name with weights, local-dir:FOLDER or hf-hub:ORG/NAME")
    parser.add_argument(
        "--data", help="'digits', an image folder, or a timm data set string (default: what the run was trained on)"
    )
    parser.add_argument("--root", help="where a timm data set string finds its files")
    parser.add_argument("--split", help="split of a timm data set string (default: validation)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args()


@exits_cleanly
def main() -> None:
    args = _arguments()
    device = choose_device(args.device)
    model = create_model(args.model, pretrained=True).to(device)
    view = View.of(resolve_data_config(model=model, verbose=False))
    images = _images(args, view)
    if len(images.classes) != model.num_classes:
        raise UserError(f"{args.model} knows {model.num_classes} classes, but the data has {len(images.classes)}")
    names = model.pretrained_cfg.get("label_names")
    if names and list(names) != images.classes:
        print("note: the class names of the data are not the model's; they are matched by position", file=sys.stderr)
    if images.unreadable:
        print(f"{len(images.unreadable)} images could not be read and are left out:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in images.unreadable), file=sys.stderr)
    batches = validation_batches(images, view, World(0, 1, device))
    bar = tqdm(batches, "evaluating", -(-len(images) // EVAL_BATCH), unit="batch", disable=None, leave=False)
    result = evaluate(model, bar)
    print(f"{args.model} on {result.images} images of {len(images.classes)} classes")
    for name in ("top1", "top5"):
        low, high = getattr(result, f"{name}_interval")
        share = getattr(result, name)
        print(f"top-{name[3:]}     {100 * share:6.2f}%  (95% interval {100 * low:.2f} to {100 * high:.2f})")
    print(f"loss      {result.loss:.4f}")
    print(f"images/s  {result.images_per_second:.0f}")
    if args.json is not None:
        try:
            args.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{args.json} cannot be written: {error.strerror}") from None


def _images(args: argparse.Namespace, view: View) -> ImageSet:
    """The named data, or what the run in a local folder was validated on."""
    if args.data is not None:
        return load_set(args.data, False, view, split=args.split, root=args.root)
    source, _, folder = args.model.partition(":")
    recipe_file = Path(folder) / "recipe.yaml"
    if source != "local-dir" or not recipe_file.is_file():
        raise UserError(f"{args.model} does not say what to evaluate it on; name a folder with --data")
    data: Data = load_recipe(str(recipe_file)).data
    changes = {"val_split": args.split, "root": args.root}
    return validation_set(data.model_copy(update={key: value for key, value in changes.items() if value}), view)


if __name__ == "__main__":
    main()
