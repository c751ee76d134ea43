"""A recipe is one whole experiment as data: YAML, checked against this schema before anything runs."""

import difflib
import inspect
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import timm.optim
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from risotto_zoo.errors import UserError, did_you_mean
from risotto_zoo.models import RisottoResNet

RECIPES = Path(__file__).parent / "recipes"

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(gt=0, lt=1)]


# They need second derivatives, or keep what no state on disk can hold.
UNFIT = ("adahessian", "kron", "kronw", "kronc")
# Arguments of timm.create_model that are not of the net itself.
NOT_OF_THE_NET = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only",
    "out_indices", "device", "dtype", "scriptable", "exportable", "no_jit",
)  # fmt: skip


class Section(BaseModel):
    # Some versions of pydantic warn of keys that begin with model_.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Data(Section):
    source: str = Field(
        "digits", description="'digits', a folder with train and val (or test) sub-folders, or a timm data set string"
    )
    root: str | None = Field(None, description="where a timm data set string finds its files")
    train_split: str = Field("train", description="split of a timm data set string, or sub-folder, to train on")
    val_split: str = Field("validation", description="split of a timm data set string, or sub-folder, to validate on")
    pipeline: Literal["resident", "streaming"] = Field(
        "resident", description="'resident' holds the set in memory, 'streaming' reads it with timm's loaders"
    )
    image_size: Count | None = Field(None, description="side of the images the net sees; the model's own if null")
    train_size: Count | None = Field(
        None,
        description="side of the random crops to train on, image_size if null; smaller is faster (arXiv 1906.06423)",
    )
    stored_size: Count | None = Field(
        None,
        description="resident: keep the largest square of each image at this side, to crop from; as validation if null",
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of the resized image that validation crops; the model's own if null"
    )
    train_images: Count | None = Field(None, description="use a fixed random subset of this many training images")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="validate on this share of the training set instead of the validation split (for tuning)"
    )
    workers: Annotated[int, Field(ge=0)] = Field(4, description="streaming: loader processes of each rank")
    loader: dict[str, Any] = Field({}, description="streaming: further arguments of timm.data.create_loader")


class Augment(Section):
    flip: bool = Field(True, description="mirror half of the images")
    shift: Annotated[int, Field(ge=0)] = Field(0, description="resident: shift by up to this many pixels, reflected")
    crop_scale: tuple[float, float] | None = Field(
        None, description="random resized crop: smallest and largest share of the area"
    )
    cutout: Annotated[int, Field(ge=0)] = Field(0, description="resident: side of a square set to the mean colour")
    mixup: Amount = Field(0.0, description="alpha of mixup's Beta distribution; 0 for none")
    cutmix: Amount = Field(0.0, description="alpha of cutmix's Beta distribution; 0 for none")
    mixup_prob: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the images that mixup or cutmix mixes at all"
    )

    @field_validator("crop_scale", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # YAML has no tuples

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1] <= 1:
            raise ValueError("must be two shares, 0 < smallest <= largest <= 1")
        return value


class Optimizer(Section):
    name: str = Field("sgd", description="'sgd' (Nesterov), 'adamw', 'muon', or nearly any other name of timm.optim")
    lr: Rate = Field(0.05, description="learning rate (of the convolution kernels, for muon)")
    other_lr: Rate | None = Field(
        None,
        description="learning rate of first convolution, head, biases, norms; muon updates them by NAdamW. lr if null",
    )
    alpha_lr: Rate | None = Field(None, description="learning rate of the alphas; other_lr if null")
    weight_decay: Amount = Field(0.0, description="on kernels and matrices only, never on one-dimensional parameters")
    other_weight_decay: Amount | None = Field(
        None, description="weight decay of first convolution and head; weight_decay if null"
    )
    momentum: Share = Field(0.9, description="momentum, where the optimizer has one")
    centralize: bool = Field(
        False, description="take the mean off the gradient of each channel's kernel, but the stem's (arXiv 2004.01461)"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="factor on the learning rate from each layer to the one before (fine-tuning)"
    )
    options: dict[str, Any] = Field({}, description="further arguments of the optimizer")

    @field_validator("options")
    @classmethod
    def _no_others(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, ours in {"opt": "name", "lr": "lr", "weight_decay": "weight_decay", "momentum": "momentum"}.items():
            if key in value:
                raise ValueError(f"{key} is a key of its own, optimizer.{ours}")
        return value

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        known = [name for name in timm.optim.list_optimizers() if name not in UNFIT]
        if value not in known:
            raise ValueError(f"unknown optimizer {value!r}{did_you_mean(value, known)}")
        return value

    def filled(self) -> "Optimizer":
        """With the values that null stands for."""
        other_lr = self.other_lr or self.lr
        decay = self.weight_decay if self.other_weight_decay is None else self.other_weight_decay
        return self.model_copy(
            update={"other_lr": other_lr, "alpha_lr": self.alpha_lr or other_lr, "other_weight_decay": decay}
        )


class Clip(Section):
    mode: Literal["norm", "value", "agc"] = Field("norm", description="what is limited: the norm, each value, or AGC")
    value: Rate = Field(description="the limit")


class Recipe(Section):
    model: str = Field("risotto_resnet20", description="name of a timm model; with init_from, the checkpoint's counts")
    model_args: dict[str, Any] = Field({}, description="keyword arguments of timm.create_model, such as init and alpha")
    init_from: str | None = Field(
        None, description="start from a checkpoint: a model name with weights, local-dir:FOLDER or hf-hub:ORG/NAME"
    )
    freeze: Annotated[int, Field(ge=0, le=5)] = Field(
        0, description="fine-tuning: parts that stay as they are: 1 the stem, 2 the first stage too, ..."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="fixes weights, order and augmentation")
    epochs: Count = Field(20, description="passes over the training set")
    batch_size: Count = Field(128, description="images of one optimizer step, over all processes and accumulations")
    accumulate: Count = Field(1, description="parts that the batch of each process is worked through in")
    data: Data = Data()
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after the warm-up")
    warmup_epochs: Amount = Field(0.0, description="linear rise of the learning rate from 0, in epochs")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="weight of the uniform distribution")
    ema_decay: Decay | None = Field(
        None, description="keep a moving average of the weights; its decay after timm's warm-up, 1 - step^(-2/3)"
    )
    clip: Clip | None = Field(None, description="gradient clipping")
    weight_standardization: bool = Field(
        False, description="train centred and scaled kernels with a gain per channel; folded away on export"
    )
    amp: Literal["bfloat16", "float16"] | None = Field(None, description="autocast dtype of the training steps")
    channels_last: bool = Field(False, description="memory format")
    compile: bool = Field(False, description="torch.compile the training step's model")
    cuda_graph: bool = Field(
        False, description="replay the training step as one CUDA graph, in a single process on CUDA"
    )
    tf32: bool = Field(True, description="TensorFloat-32 matrix products while training on CUDA")
    sync_bn: bool = Field(False, description="synchronize batch norm over processes")
    val_every: Count = Field(1, description="epochs from one validation to the next; the last epoch always has one")
    save_every: Count = Field(1, description="epochs from one saved state to the next; the last epoch always has one")
    save_minutes: Rate = Field(10.0, description="save the state at least this often")
    resume: Literal["auto", "never"] = Field("auto", description="go on with an unfinished run found in the output")
    log_every: Count = Field(50, description="steps between two log lines where there is no terminal")
    tensorboard: bool = Field(False, description="also write TensorBoard events")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        problems = [
            (self.batch_size % self.accumulate, f"batch_size {self.batch_size} is no multiple of accumulate"),
            (
                self.warmup_epochs >= self.epochs,
                f"warmup_epochs {self.warmup_epochs} leaves nothing of the epochs; set warmup_epochs=0",
            ),
            (self.batch_size < 2 and (self.augment.mixup or self.augment.cutmix), "mixup and cutmix need two images"),
            (
                self.augment.mixup_prob < 1 and not (self.augment.mixup or self.augment.cutmix),
                "augment: mixup_prob has no effect without mixup or cutmix; set one of them or leave it out",
            ),
            (
                self.optimizer.layer_decay is not None
                and any(
                    value is not None
                    for value in (self.optimizer.other_lr, self.optimizer.alpha_lr, self.optimizer.other_weight_decay)
                ),
                "optimizer: layer_decay has groups of its own; leave other_lr, alpha_lr and other_weight_decay out",
            ),
            (
                self.optimizer.layer_decay is not None and self.weight_standardization,
                "optimizer: layer_decay does not go with weight_standardization",
            ),
            (
                self.optimizer.centralize and self.weight_standardization,
                "optimizer.centralize has no effect with weight_standardization; leave one of them out",
            ),
            (
                any(key in NOT_OF_THE_NET for key in self.model_args),
                f"model_args takes none of {', '.join(NOT_OF_THE_NET)}; to start from weights, set init_from",
            ),
            (
                self.cuda_graph and self.amp == "float16",
                "cuda_graph: float16's loss scaling waits for the device; set amp=bfloat16",
            ),
            (self.freeze and self.init_from is None, "freeze without init_from would freeze random weights"),
            (
                self.data.pipeline == "streaming" and (self.augment.shift or self.augment.cutout),
                "augment: shift and cutout belong to the resident pipeline; data.loader takes re_prob for streaming",
            ),
            (
                self.data.pipeline == "streaming" and self.augment.crop_scale is None,
                "data: the streaming pipeline trains on random crops; set augment.crop_scale",
            ),
            (
                self.data.pipeline == "streaming" and (self.data.holdout or self.data.train_images),
                "data: holdout and train_images belong to the resident pipeline",
            ),
            (
                self.data.pipeline == "streaming" and self.data.stored_size is not None,
                "data: stored_size belongs to the resident pipeline",
            ),
            (
                self.data.pipeline == "resident" and self.data.loader,
                "data: loader belongs to the streaming pipeline; set data.pipeline=streaming",
            ),
            (
                self.data.stored_size is not None and self.augment.crop_scale is None,
                "data: stored_size has no effect without augment.crop_scale",
            ),
            (
                self.data.train_size is not None and self.augment.crop_scale is None,
                "data: train_size is the side of random crops; set augment.crop_scale",
            ),
        ]
        for wrong, message in problems:
            if wrong:
                raise ValueError(message)
        return self


def load_recipe(name_or_file: str, settings: list[str] | None = None) -> Recipe:
    """Read a recipe by its shipped name or its file, with `base:` resolved and `key.sub=value` settings applied.

    Raises:
        UserError: For an unknown recipe, unreadable YAML, or keys and values the schema refuses; the message names
            the file, the key and the nearest valid one.
    """
    path = _recipe_path(name_or_file)
    values = read_with_base(path)
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write it as key=value, such as --set optimizer.lr=0.01")
        try:
            assign(values, key.split("."), _setting(key, text))
        except (yaml.YAMLError, ValueError):
            raise UserError(f"--set {setting}: {text!r} is not a YAML value") from None
    recipe = validate(values, str(path))
    try:
        written = json.loads(recipe.model_dump_json())
    except ValueError:  # bytes that are no text, or what holds itself
        written = {"model_args": None, "optimizer": {"options": None}, "data": {"loader": None}}
    for key, given, told in (
        ("model_args", recipe.model_args, written["model_args"]),
        ("optimizer.options", recipe.optimizer.options, written["optimizer"]["options"]),
        ("data.loader", recipe.data.loader, written["data"]["loader"]),
    ):
        if given != told:
            raise UserError(
                f"{path}: {key} holds what cannot be written down and read back; it takes text, finite numbers, true, "
                "false, null, and lists and mappings by name of these"
            )
    return recipe


def validate(values: dict[str, Any], source: str) -> Recipe:
    """Check plain values against the schema; `source` is named in the UserError if they do not fit."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error.errors()[0])}") from None


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every key written out, in the order of the schema."""
    return yaml.dump(json.loads(recipe.model_dump_json()), Dumper=_Dumper, sort_keys=False)


def without_places(recipe: Recipe) -> Recipe:
    """The recipe for other people to read: of absolute paths of the machine that ran it, only the last name."""
    data = {key: _last_name(getattr(recipe.data, key)) for key in ("source", "root")}
    start = recipe.init_from
    if start is not None and start.startswith("local-dir:"):
        start = f"local-dir:{_last_name(start.removeprefix('local-dir:'))}"
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data), "init_from": start})


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """The keys in which two recipes differ, but for those that cannot change the outcome."""
    filled = [recipe.model_copy(update={"optimizer": recipe.optimizer.filled()}) for recipe in (ours, theirs)]
    sides = [_flat(recipe.model_dump()) for recipe in filled]
    idle = {"val_every", "save_every", "save_minutes", "resume", "log_every", "tensorboard"}
    if ours.data.pipeline == theirs.data.pipeline == "resident":
        idle.add("data.workers")
    keys = sorted(sides[0].keys() | sides[1].keys())
    return [key for key in keys if key not in idle and sides[0].get(key) != sides[1].get(key)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for key, value in values.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def _last_name(place: str | None) -> str | None:
    """Of a place that lies outside the folder one works in, which is nobody else's business."""
    outside = place is not None and (Path(place).is_absolute() or ".." in Path(place).parts or place[:1] == "~")
    return Path(os.path.abspath(place)).name if outside else place


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


class _Twice(yaml.MarkedYAMLError):
    """A key that stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; everyone who writes it means the number. And of a key that stands twice PyYAML
    keeps the last in silence."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Raises `_Twice` for a repeated key."""
        node, found = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            known = (key.tag, str(key.value))
            if known in found and key.value != "<<":
                raise _Twice(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            found.add(known)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)


def _setting(key: str, text: str) -> Any:
    """The value of a setting. Names and paths are taken as they are, unless quoted: YAML ends them at ' #'."""
    text = text.strip()
    section: type[Section] | None = Recipe
    *sections, last = key.split(".")
    for name in sections:
        field = section.model_fields.get(name) if section is not None else None
        section = section_of(field.annotation) if field is not None else None
    field = section.model_fields.get(last) if section is not None else None
    textual = field is not None and field.annotation in (str, str | None)
    return text if textual and text.lower() not in ("", "~", "null") and text[0] not in "\"'" else _parse(text)


def _recipe_path(name_or_file: str) -> Path:
    shipped = RECIPES / f"{name_or_file}.yaml"
    path = shipped if shipped.is_file() else Path(name_or_file)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in name_or_file:
        raise UserError(f"recipe {name_or_file}: there is no such file")
    names = recipe_names()
    raise UserError(f"unknown recipe {name_or_file!r}{did_you_mean(name_or_file, names)} (there is {', '.join(names)})")


def read_with_base(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The plain values of a YAML file, those of the file that it names as its `base` beneath them.

    Raises:
        UserError: If a file is missing or not YAML, or the bases go round in a circle.
    """
    if path.resolve() in seen:
        raise UserError(f"{path}: base goes round in a circle")
    try:
        values = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = error.problem if isinstance(error, _Twice) else "not valid YAML"
        raise UserError(f"{path}{where}: {reason}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a list of keys and values, such as 'epochs: 20'")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or not (path.parent / base).is_file():
        raise UserError(f"{path}: base {base!r} is no file beside it")
    return _merged(read_with_base(path.parent / base, (*seen, path.resolve())), values)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a nested key in place, making the sections on its way."""
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


def explain(error: dict[str, Any], schema: type[BaseModel] = Recipe) -> str:
    """One of pydantic's errors as people put it, with the nearest valid key for an unknown one."""
    key = ".".join(str(part) for part in error["loc"])
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = _known_keys(schema)
        last = key.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == last]
        near += difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        if "model_args" in known and last in inspect.signature(RisottoResNet).parameters:
            near.append(f"model_args.{last}")
        return f"unknown key {key!r}; " + (f"the nearest is {near[0]!r}" if near else "training/README.md lists all")
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, not {given!r}"


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        nested = section_of(field.annotation)
        if nested is not None:
            keys += _known_keys(nested, f"{prefix}{name}.")
    return keys


def section_of(annotation: Any) -> type[Section] | None:
    """The nested section of a field's type, through `| None`; None if the field is a plain value."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        # In Python 3.10 dict[str, Any] is an instance of type, too.
        if get_origin(candidate) is None and isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
