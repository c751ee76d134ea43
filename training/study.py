"""Studies: the paper's claims, measured. python -m training.study NAME

Runs what is missing of a study's grid of trainings (`propagation` and `first_step` measure nets as they start), then
writes the tables, figures and report of all studies from the committed results; `report` only does the latter.
"""

import argparse
from pathlib import Path

from risotto_zoo.errors import UserError, exits_cleanly

from . import grid, report
from .pages import write_pages
from .report import MEASURED


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"studies: {', '.join([*MEASURED, *grid.study_names()])}",
    )
    parser.add_argument("name", help="a study, or report")
    parser.add_argument("--jobs", type=int, help="trainings at once (default: a CPU's cores; 4 on a GPU)")
    parser.add_argument("--device", help="cpu, cuda (default: cuda where there is one)")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(".data/cifar10-jpeg"),
        help=f"{', '.join(MEASURED)}: image folder (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.jobs is not None and args.jobs < 1:
        raise UserError("--jobs starts at 1")
    if args.name in MEASURED:
        MEASURED[args.name].conduct(args.data)
    elif args.name != "report":
        grid.conduct(args.name, args.jobs or grid.default_jobs(args.device), args.device)
    write_pages(report.pages())


if __name__ == "__main__":
    main()
