"""Model cards, the manifest of releases and the README's results table: python -m training.cards writes them all.

Everything in them comes from the release folders in model_cards (results.json, config.json, recipe.yaml), and the lines
of nets without a release from the records in training/results. With --check nothing is written, and a page that is
stale is an error.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from matplotlib.figure import Figure
from timm.models import get_pretrained_cfg

from risotto_zoo.checkpoints import WEIGHTS
from risotto_zoo.errors import UserError, exits_cleanly
from risotto_zoo.files import sha256
from risotto_zoo.hub import DEFAULT_ORGANIZATION, PACKAGE

from .files import read_json
from .pages import ROOT, between, check_pages, write_pages
from .recipe import Recipe, load_recipe
from .run_folder import best, literal, png, version_of

CARDS = ROOT / "model_cards"

DATASETS = {
    "cifar10-jpeg": {
        "title": "CIFAR-10 as 32 px JPEG",
        "hub": "uoft-cs/cifar10",
        "split": "test",
        "caveat": "All 60,000 CIFAR-10 images, re-encoded as 32 x 32 JPEG at quality 75 (4:2:0). Compression costs "
        "detail: the numbers can be compared with the other rows of the table, not with published CIFAR-10 numbers.",
    },
    "imagenette224": {
        "title": "Imagenette (2019 split) as 224 px JPEG",
        "hub": "frgfm/imagenette",
        "split": "validation",
        "caveat": "The 13,394 photos of Imagenette's 2019 split as squares of 224 px, re-encoded as JPEG at "
        "quality 75: the numbers can be compared with the other rows of the table, not with Imagenette's leaderboard.",
        "labels": {
            "n01440764": "tench",
            "n02102040": "English springer",
            "n02979186": "cassette player",
            "n03000684": "chain saw",
            "n03028079": "church",
            "n03394916": "French horn",
            "n03417042": "garbage truck",
            "n03425413": "gas pump",
            "n03445777": "golf ball",
            "n03888257": "parachute",
        },
    },
    "digits": {
        "title": "scikit-learn's scanned digits",
        "hub": None,
        "split": "test",
        "caveat": "1,797 scans of 8 x 8 pixels; a random fifth of each class is held out. A toy to try the tools with.",
    },
}
LICENSE = "apache-2.0"
RECORDS = Path(__file__).parent / "results"  # of runs that are not released


def releases() -> dict[str, dict[str, Any]]:
    """The results of every release, by name."""
    return {folder.name: read_json(folder / "results.json") for folder in _folders()}


def manifest() -> str:
    """risotto_zoo/manifest.json: what the library needs to know of each release.

    A net's first release is what its name means without a tag: of the data sets that are known here, in their order.
    """
    entries = {}
    for name, result in sorted(releases().items(), key=_rank):
        entries[name] = {
            "location": result["location"],
            "revision": f"v{result['version']}",
            "bytes": result["bytes"],
            "sha256": result["sha256"][WEIGHTS],
            "config": read_json(CARDS / name / "config.json"),
        }
    return json.dumps(entries, indent=1) + "\n"


def _rank(release: tuple[str, Any]) -> tuple[str, int, str]:
    net, _, tag = release[0].partition(".")
    return net, [*DATASETS, tag].index(tag), tag


def results_table() -> str:
    """README: one row a release, then the nets whose numbers alone were kept, beside those of their twins."""
    rows = [
        "| model | data | top-1 (95% interval) | with batch norm | parameters | training | weights |",
        "|---|---|---|---|---|---|---|",
    ]
    released = releases()
    for name, result in released.items():
        model, _, tag = name.partition(".")
        twin = next((_as_released(b, result) for b in result["baselines"] if b["model"] == f"{model}_bn"), None)
        rows.append(_row(f"[`{model}`](model_cards/{name})", tag, result, twin, _weights(result)))
    for path in sorted(RECORDS.glob("*.json")):
        other = path.with_stem(f"{path.stem}_bn")
        if not other.is_file():
            continue
        (result, holdout), (twin, _) = map(_recorded, (path, other))
        if holdout or any(result[key] != twin[key] for key in ("data", "train_images", "epochs")):
            continue
        if f"{result['model']}.{Path(result['data']).name}" not in released:
            rows.append(_row(f"`{result['model']}`", Path(result["data"]).name, result, twin, "not released"))
    return "\n".join(rows)


def _recorded(path: Path) -> tuple[dict[str, Any], float]:
    """The results of a record, as a release has them, and the share of the training images they were judged on."""
    record = read_json(path)
    return {**record["results"], "evaluation": best(record["results"])}, record["recipe"]["data"]["holdout"]


def _row(model: str, tag: str, result: dict[str, Any], twin: dict[str, Any] | None, weights: str) -> str:
    beside = _percent(twin["evaluation"]["top1"]) if twin else "-"
    return (
        f"| {model} | {tag} | {_score(result)} | {beside} | {result['parameters'] / 1e6:.2f} M | {_training(result)} "
        f"| {weights} |"
    )


def card(folder: Path, repo_id: str | None = None) -> str:
    """README.md of a release folder, which is its card on the Hub.

    Args:
        folder: Of a release.
        repo_id: The repository it says to load from; the zoo's own if None.
    """
    result, config = read_json(folder / "results.json"), read_json(folder / "config.json")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    name = result["name"]
    model, _, tag = name.partition(".")
    repo_id = repo_id or f"{DEFAULT_ORGANIZATION}/{name}"
    other = {
        "title": tag,
        "hub": None,
        "split": "validation",
        "caveat": f"The images in `{result['data']}`, as the recipe names them.",
    }
    data = DATASETS.get(tag, other)
    judged = data["split"]
    parts = [
        f"---\n{_metadata(name, result, data).to_yaml()}\n---",
        f"# {name}",
        _what(model, result, config, data),
        "## Results",
        _results(result, judged),
        f"**Data.** {data['caveat']}{_subset(result, recipe)}",
        "## Use",
        _use(repo_id, config, result),
        "## Fine-tune",
        "```bash\npython -m training.train --recipe finetune "
        f"--init-from hf-hub:{repo_id} --set data.source=FOLDER\n```",
        *([_finetunes(result)] if result["finetunes"] else []),
        "## Reproduce",
        _reproduce(folder, result, recipe),
    ]
    if result["isometry"] is not None:
        parts += ["## At initialization", _isometry(result)]
    parts += ["## Limits", _limits(result, config, judged), "## Source", _SOURCE]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[Path, bytes]:
    """Every generated file, as it should be."""
    readme = ROOT / "README.md"
    absent = [f"{name}/{WEIGHTS}" for name, result in releases().items() if result["location"] == "hub"]
    ignored = "".join(f"{line}\n" for line in ["# Generated: weights that are on the Hub alone.", *absent])
    texts = {
        CARDS / ".gitignore": ignored,
        **{folder / "README.md": card(folder) for folder in _folders()},
        PACKAGE / "manifest.json": manifest(),
        readme: between(readme.read_text(encoding="utf-8"), "results", results_table()),
    }
    return {path: text.encode() for path, text in texts.items()}


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _folders() -> list[Path]:
    return sorted(path.parent for path in CARDS.glob("[!.]*/results.json"))


def _check_files() -> None:
    """Results belong to the files beside them; weights that are on the Hub alone may be missing."""
    for name, result in releases().items():
        for file, digest in result["sha256"].items():
            path = CARDS / name / file
            if file == WEIGHTS and result["location"] == "hub" and not path.exists():
                continue
            if not path.exists() or sha256(path.read_bytes()) != digest:
                raise UserError(f"{path} is missing or is not what results.json describes; release the run again")


# --- parts of a card


def _metadata(name: str, result: dict[str, Any], data: dict[str, Any]) -> ModelCardData:
    score, tag = result["evaluation"], name.partition(".")[2]
    common = {
        "task_type": "image-classification",
        "task_name": "Image classification",
        "dataset_type": data["hub"] or tag,
        "dataset_name": data["title"],
        "dataset_split": data["split"],
    }
    kinds = [] if name.partition(".")[0].endswith("_bn") else ["normalizer-free"]
    values = [("accuracy", "Top-1", score["top1"]), ("top-5-accuracy", "Top-5", score["top5"])]
    return ModelCardData(
        model_name=name,
        license=result.get("license", LICENSE),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "risotto", *kinds, "arxiv:2210.02411"],
        datasets=[data["hub"]] if data["hub"] else None,
        metrics=["accuracy"],
        eval_results=[
            EvalResult(metric_type=kind, metric_name=title, metric_value=round(100 * value, 4), **common)
            for kind, title, value in values
        ],
        base_model=_base_model(result.get("init_from")),
        ignore_metadata_errors=False,
    )


def _base_model(init_from: str | None) -> str | None:
    """The Hub repository that a fine-tuned model began from, if it has one."""
    source, _, place = (init_from or "").rpartition(":")
    if init_from is None or source == "local-dir":
        return None
    if source:
        return place.partition("@")[0]
    cfg = get_pretrained_cfg(place, allow_unregistered=True)  # of a name without a tag, its default weights'
    if cfg is None or not cfg.hf_hub_id:
        return None
    ours = f"{cfg.architecture}.{cfg.tag}" in releases()
    return f"{DEFAULT_ORGANIZATION}/{cfg.architecture}.{cfg.tag}" if ours else cfg.hf_hub_id.partition("@")[0]


def _what(model: str, result: dict[str, Any], config: dict[str, Any], data: dict[str, Any]) -> str:
    side = config["pretrained_cfg"]["input_size"]
    kind = "with batch normalization" if model.endswith("_bn") else "without any normalization"
    paper = "initialized by RISOTTO ([arXiv 2210.02411](https://arxiv.org/abs/2210.02411))"
    start = paper if result["init"] == "risotto" else f"initialized by the scheme '{result['init']}' of risotto-zoo"
    if "init_from" in result:
        start = f"fine-tuned from {result['init_from'].replace('local-dir:', 'a run of its author, ')}"
    return (
        f"A ResNet {kind}, {start}, trained on {data['title']}: "
        f"{config['num_classes']} classes, {side[0]} x {side[1]} x {side[2]} inputs, "
        f"{result['parameters'] / 1e6:.2f} M parameters, {result['dtype']}. The Python package risotto-zoo registers "
        "the architecture with timm."
    )


def _results(result: dict[str, Any], judged: str) -> str:
    rows = [
        "| model | top-1 (95% interval) | top-5 | loss | epochs, seed | training |",
        "|---|---|---|---|---|---|",
    ]
    for i, row in enumerate([result, *(_as_released(baseline, result) for baseline in result["baselines"])]):
        score = row["evaluation"]
        name = f"**{row['model']}**" if i == 0 else f"{row['model']}{_age(row, result)}"
        rows.append(
            f"| {name} | {_score(row)} | {_percent(score['top5'])} | {score['loss']:.4f} "
            f"| {row['epochs']}, {row['seed']} | {duration(row['train_seconds'])} on {row['hardware']} |"
        )
    images, averaged = result["evaluation"]["images"], "averaged" in result
    keys = sorted({key for row in result["baselines"] for key in row.get("differs", ["model", "optimizer.lr"])})
    beside = " The other rows were trained on the same files by the same recipe"
    beside += f", but for {', '.join(keys)}." if keys else "."
    earlier = result["version"] - 1
    note = f"On {images:,} {judged} images, in float32, after the last epoch. "
    seen = [f"{earlier} earlier version{'s' if earlier > 1 else ''} of this model"] if earlier else []
    seen += ["other nets of this zoo"] if result["in_zoo"] and _siblings(result["name"]) else []
    note += (
        f"No epoch was chosen on them, but {' and '.join(seen)} had been tested on them when this one's recipe was made"
        if seen
        else "Nothing was chosen on them"
        if result["in_zoo"]
        else "No epoch was chosen on them"
    )
    note += f", but that of raw and averaged weights the {result['weights']} ones were kept." if averaged else "."
    if result["baselines"]:
        note += beside
    return "\n".join(rows) + f"\n\n{note}\n\n![Learning curves](curves.png)"


def _age(baseline: dict[str, Any], result: dict[str, Any]) -> str:
    """A baseline is as it was when it was compared with; its net may have been released again since."""
    now = _release_of(baseline, result)
    if baseline.get("differs") == ["seed"] or now is None or now["train_seconds"] == baseline["train_seconds"]:
        return ""
    return ", an earlier version"


def _as_released(baseline: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """A baseline with the numbers of its release, which may be those of float16, if it is the very run released."""
    now = _release_of(baseline, result)
    same = now is not None and now["train_seconds"] == baseline["train_seconds"]
    return {**baseline, "evaluation": now["evaluation"]} if same else baseline


def _release_of(baseline: dict[str, Any], result: dict[str, Any]) -> dict[str, Any] | None:
    """What is released of a baseline's net on the same data now."""
    return releases().get(f"{baseline['model']}.{result['name'].partition('.')[2]}") if result["in_zoo"] else None


def _siblings(name: str) -> list[str]:
    """Other nets tested on the same data, released or not; twins are trained together, so they do not count."""
    net, _, tag = name.partition(".")
    tested = [release.split(".", 1) for release in releases()]
    for record in map(read_json, sorted(RECORDS.glob("*.json"))):
        if not record["recipe"]["data"]["holdout"]:
            tested.append([record["results"]["model"], Path(record["results"]["data"]).name])
    return [one for one, other in tested if other == tag and one.removesuffix("_bn") != net.removesuffix("_bn")]


def _use(repo_id: str, config: dict[str, Any], result: dict[str, Any]) -> str:
    repo = f"hf-hub:{repo_id}"
    by_name = f'model = timm.create_model("{result["name"]}", pretrained=True).eval()\n' if result["in_zoo"] else ""
    text = f"""```python
import timm
import risotto_zoo  # registers the architecture

{by_name}model = timm.create_model("{repo}", pretrained=True).eval()
classifier = risotto_zoo.load("{repo}")
classifier.model, classifier.transform, classifier.classes
```

```bash
risotto-zoo predict IMAGE --model {repo}
```"""
    model = result["model"]
    plain = model.removeprefix("risotto_").removesuffix("_bn")
    if model.endswith("_bn") and plain in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        channels = config["pretrained_cfg"]["input_size"][0]
        inputs = "" if channels == 3 else f", in_chans={channels}"
        text += f"""

The weights fit timm's own {plain}, without risotto-zoo:

```python
from huggingface_hub import hf_hub_download

weights = hf_hub_download("{repo_id}", "{WEIGHTS}")
model = timm.create_model("{plain}", num_classes={config["num_classes"]}{inputs}, checkpoint_path=weights)
```"""
    return text


def _finetunes(result: dict[str, Any]) -> str:
    rows = [
        "| data | training images, epochs | from these weights | from scratch | judged on |",
        "|---|---|---|---|---|",
    ]
    for sides in result["finetunes"]:
        tuned, scratch = sides["tuned"], sides["scratch"]
        rows.append(
            f"| {Path(tuned['data']).name} at {tuned['size']} px | {tuned['train_images']:,}, {tuned['epochs']} "
            f"| {_score(tuned)} | {_score(scratch)} | {tuned['evaluation']['images']:,} images |"
        )
    return "\n".join(rows) + (
        "\n\nTop-1 on held-out images, one seed each. The runs from scratch have the same architecture, but a start "
        "and an optimizer of their own, which need not be those that these weights were trained with."
        "\n\n![Fine-tuning](finetune.png)"
    )


def finetune_figure(finetunes: list[dict[str, Any]]) -> bytes:
    """finetune.png: accuracy by epoch from these weights and from scratch, one panel a data set."""
    figure = Figure(figsize=(4.5 * len(finetunes), 3.4), layout="constrained")
    for axes, sides in zip(figure.subplots(1, len(finetunes), squeeze=False)[0], finetunes, strict=True):
        for side, label in (("tuned", "from these weights"), ("scratch", "from scratch")):
            points = [(i, 100 * value) for i, value in enumerate(sides[side]["by_epoch"], 1) if value is not None]
            axes.plot(*zip(*points, strict=True), ".-", label=label)
        axes.set(xlabel="epoch", ylabel="top-1 (%)", title=literal(Path(sides["tuned"]["data"]).name))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return png(figure)


def _subset(result: dict[str, Any], recipe: Recipe) -> str:
    if recipe.data.train_images is None:
        return ""
    return f" Trained on {result['train_images']:,} of the training images, a fixed random subset."


def _reproduce(folder: Path, result: dict[str, Any], recipe: Recipe) -> str:
    versions = ", ".join(f"{package} {version_of(folder, package)}" for package in ("risotto-zoo", "torch", "timm"))
    needed = f"this\nrepository in FOLDER and the data in `{recipe.data.source}`"
    if (recipe.init_from or "").startswith("local-dir:"):
        begun = recipe.init_from.removeprefix("local-dir:")
        needed += f", and the run of its author that it began from, which is\nnot published, in `{begun}`"
    return f"""`recipe.yaml` is the whole experiment, `metrics.csv` its log. In a checkout of risotto-zoo, \
with {needed}:

```bash
python -m training.train --recipe FOLDER/recipe.yaml --output runs/again
python -m training.evaluate local-dir:runs/again
```

Training took {duration(result["train_seconds"])} on {result["hardware"]} \
({result["train_images_per_second"]:.0f} images/s) and was begun with {versions}; other hardware and versions \
need not give the same weights."""


def _isometry(result: dict[str, Any]) -> str:
    values = result["isometry"]
    return (
        "Before the first step, the Jacobian of the signal of the last feature map (the difference of paired channels) "
        f"with respect to the image had singular values from {values['smallest']:.7f} to {values['largest']:.7f} "
        f"({values['probes']} random probes, float32)."
    )


def _limits(result: dict[str, Any], config: dict[str, Any], judged: str) -> str:
    again = sum(row["model"] == result["model"] and row.get("differs") == ["seed"] for row in result["baselines"])
    seeds = f"{1 + again} seeds were trained, of which this is one" if again else "One seed was trained"
    return (
        f"It knows {config['num_classes']} classes and answers with one of them whatever it is shown. {seeds}; "
        f"the interval above is that of the {judged} images, not of training. It has not been tested for "
        "robustness or bias, its confidence has not been calibrated, and it is meant for research."
    )


_SOURCE = """The initialization is that of "Dynamical Isometry for Residual Networks" (A. Gadhikar, R. Burkholz); the
construction for identity skips is risotto-zoo's.

```bibtex
@article{gadhikar2022dynamical,
  title   = {Dynamical Isometry for Residual Networks},
  author  = {Gadhikar, Advait and Burkholz, Rebekka},
  journal = {arXiv preprint arXiv:2210.02411},
  year    = {2022}
}
```"""


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _score(result: dict[str, Any]) -> str:
    score = result["evaluation"]
    low, high = score["top1_interval"]
    return f"{_percent(score['top1'])} ({100 * low:.2f} to {100 * high:.2f})"


def _training(result: dict[str, Any]) -> str:
    return (
        f"{result['epochs']} epochs, seed {result['seed']}, {duration(result['train_seconds'])}, {result['hardware']}"
    )


def _weights(result: dict[str, Any]) -> str:
    place = {"package": "in the package", "repository": "in the repository", "hub": "on the Hub"}[result["location"]]
    return f"{result['bytes'] / 1e6:.1f} MB {result['dtype']}, {place}"


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.cards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 2 if a page is stale")
    args = parser.parse_args()
    _check_files()
    if args.check:
        check_pages(pages(), "python -m training.cards")
    else:
        write_pages(pages())


if __name__ == "__main__":
    main()
