"""Every variant as a model of timm's, with the releases as its pretrained weights. Importing this registers them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from .checkpoints import WEIGHTS, check_state, folder_weights, read_tensors, read_verified
from .errors import NoWeights, UserError
from .hub import MANIFEST, fetch, release_file, release_weights, repository
from .models.resnet import OF_THE_START, RisottoResNet, check_start
from .models.variants import ORIGIN, VARIANTS, Variant

__all__: list[str] = []  # register_model adds every entry point

# Arguments that weights of the plain net need not fit; heads and stems of other widths are adapted.
_SHAPING = {"block", "layers", "channels", "stem", "norm", "skip", "init", "global_pool"}


def _release_cfg(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """timm's default cfg of a release: how its images are prepared, its labels, and where its weights lie."""
    config = entry["config"]
    file = release_file(name)
    return {
        **ORIGIN,
        **{key: tuple(value) if isinstance(value, list) else value for key, value in config["pretrained_cfg"].items()},
        "label_names": tuple(config["label_names"]),
        "label_descriptions": config.get("label_descriptions"),
        "hf_hub_id": f"{repository(name)}@{entry['revision']}",
        **({"file": str(file)} if file is not None else {}),
    }


def _default_cfgs() -> dict[str, dict[str, Any]]:
    """By name and tag; a net with releases goes by their tags alone, the manifest's first being the default."""
    cfgs: dict[str, dict[str, Any]] = {}
    for name, variant in VARIANTS.items():
        releases = {key: entry for key, entry in MANIFEST.items() if key.partition(".")[0] == name}
        cfgs.update({key: _release_cfg(key, entry) for key, entry in releases.items()} or {name: variant.cfg})
    return cfgs


default_cfgs = generate_default_cfgs(_default_cfgs())


def _verified_weights(cfg: dict[str, Any], cache_dir: str | Path | None) -> tuple[dict[str, Tensor], str]:
    """The tensors that a pretrained cfg stands for, and where it says they are; hashes are checked first."""
    if cfg.get("source") == "local-dir":
        return folder_weights(Path(cfg["file"])), str(Path(cfg["file"]) / WEIGHTS)
    if cfg.get("source") == "hf-hub":  # whatever else the repository's own configuration names
        return _of_repository(cfg["hf_hub_id"], cache_dir)
    if cfg.get("hf_hub_filename") not in (None, WEIGHTS):
        raise UserError(f"{cfg['architecture']}: hf_hub_filename is {cfg['hf_hub_filename']!r}; only {WEIGHTS} is read")
    name = f"{cfg['architecture']}.{cfg.get('tag') or ''}"
    ours = _release_cfg(name, MANIFEST[name]) if name in MANIFEST else {}
    if cfg.get("file") and cfg["file"] != ours.get("file"):  # the caller's own, by pretrained_cfg_overlay
        if Path(cfg["file"]).suffix in (".pth", ".pt", ".bin", ".tar", ".ckpt"):
            raise UserError(f"{cfg['file']}: only safetensors are read, no other format")
        return read_tensors(read_verified(Path(cfg["file"])), cfg["file"]), cfg["file"]
    if cfg.get("hf_hub_id") and cfg["hf_hub_id"] != ours.get("hf_hub_id"):
        return _of_repository(cfg["hf_hub_id"], cache_dir)
    if cfg.get("url"):
        raise UserError(
            f"{cfg['architecture']}: weights from a URL cannot be verified; download them and name the file"
        )
    if ours:
        return release_weights(name, cache_dir), ours.get("file") or ours["hf_hub_id"]
    released = ", ".join(MANIFEST) or "none yet"
    raise NoWeights(f"{cfg['architecture']} has no pretrained weights; released are: {released}")


def _of_repository(hub_id: str, cache_dir: str | Path | None) -> tuple[dict[str, Tensor], str]:
    repo_id, _, revision = hub_id.partition("@")
    source = f"{hub_id}/{WEIGHTS}"
    return read_tensors(fetch(repo_id, WEIGHTS, revision or None, cache_dir), source), source


def _entry_point(name: str, variant: Variant) -> Callable[..., RisottoResNet]:
    """A timm entry point that builds the variant; arguments of the caller go before those of the table."""

    def create(pretrained: bool = False, **kwargs: Any) -> RisottoResNet:
        cfg = resolve_pretrained_cfg(
            name, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
        ).to_dict()
        weights, origin = cfg.pop("state_dict", None), "the state dict"
        if pretrained and not weights:
            weights, origin = _verified_weights(cfg, kwargs.get("cache_dir"))
        source = cfg.get("source", "")
        if weights:  # timm copies what stands in a cfg, so this stands for them until `checked` hands them over
            cfg |= {"source": "", "state_dict": {"stands for": "verified weights"}}
        asked = kwargs.get("num_classes", cfg["num_classes"]), kwargs.get("in_chans", cfg["input_size"][0])
        whole = pretrained and asked == (cfg["num_classes"], cfg["input_size"][0]) and not kwargs.get("features_only")
        whole &= cfg["num_classes"] >= 0  # below, timm makes a new head in any case
        check_start(**{key: kwargs[key] for key in OF_THE_START & kwargs.keys()})
        levels = len(kwargs.get("layers", variant.net["layers"])) + 1
        wanted = kwargs.get("out_indices") if kwargs.get("features_only") else None
        for level in range(wanted) if isinstance(wanted, int) else wanted or ():
            if not -levels <= level < levels:
                raise ValueError(f"out_indices {wanted}: {name} has feature maps 0 (its stem's) to {levels - 1}")
        if pretrained and not whole:  # what they say of the start is void, and may not even fit the net
            kwargs = {key: value for key, value in kwargs.items() if key not in ("alpha", "rotated_pairs", "patches")}
        # Every weight is about to be overwritten, so none is drawn; Fixup has parameters of its own, so it is made.
        blank = {"init": None} if whole and kwargs.get("init") != "fixup" else {}

        def checked(_: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
            check_state(weights, model, cfg, origin, kwargs.keys() & _SHAPING)
            return weights

        model = build_model_with_cfg(
            RisottoResNet,
            name,
            pretrained,
            pretrained_cfg=cfg,
            pretrained_filter_fn=checked,
            feature_cfg={"out_indices": tuple(range(levels))},
            **{**variant.net, **kwargs, **blank},
        )
        model.pretrained_cfg.pop("state_dict", None)
        model.pretrained_cfg["source"] = source
        if whole:
            model.init = kwargs.get("init", "risotto")
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = variant.doc
    create.__module__ = __name__
    setattr(sys.modules[__name__], name, create)
    return register_model(create)


for _name, _variant in VARIANTS.items():
    _entry_point(_name, _variant)
