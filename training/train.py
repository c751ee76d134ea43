"""Train a model from a recipe: python -m training.train --recipe digits"""

import argparse
import json
import signal
import sys
from pathlib import Path

from risotto_zoo.errors import exits_cleanly

from .distributed import join_world, launched, leave_world
from .engine import DIVERGED, Diverged, Stopped, train
from .recipe import load_recipe, recipe_names
from .run_folder import begun_since


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Train a model from a recipe. Under torchrun, on as many processes as it starts.",
        epilog=f"shipped recipes: {', '.join(recipe_names())}",
    )
    parser.add_argument("--recipe", default="digits", help="name of a shipped recipe, or a YAML file (default: digits)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key, e.g. --set optimizer.lr=0.01"
    )
    parser.add_argument("--output", type=Path, help="run folder (default: runs/RECIPE)")
    parser.add_argument(
        "--init-from", metavar="MODEL", help="fine-tune: a model name, local-dir:FOLDER or hf-hub:ORG/NAME"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    return parser.parse_args()


@exits_cleanly
def main() -> int:
    args = _arguments()
    # As JSON, which is YAML: the path of a folder is taken as it is.
    settings = args.set + ([f"init_from={json.dumps(args.init_from)}"] if args.init_from else [])
    recipe = load_recipe(args.recipe, settings)
    output = args.output or Path("runs") / Path(args.recipe).stem
    code = 0
    try:
        world = join_world(args.device)
        # After a restart by torchrun, what its first attempt left in the folder is this run's own. Of several machines
        # one may have joined later, so it is enough that one knows.
        moment = launched()
        ours = bool(world.largest(int(moment is not None and begun_since(output, moment))))
        train(recipe, output, world, args.overwrite and not ours, ours)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        code = DIVERGED
    except Stopped as stopped:
        number = int(stopped.args[0])
        again = "without --overwrite " if args.overwrite else ""
        again += "with --set resume=auto " if recipe.resume == "never" else ""
        print(f"stopped by {signal.Signals(number).name}; the same command {again}goes on from here", file=sys.stderr)
        code = 128 + number
    # Any other exception may be this process's alone; leaving the group would then wait for the others, which wait for
    # this one. It ends without that, and torchrun ends them.
    leave_world()
    return code


if __name__ == "__main__":
    main()
