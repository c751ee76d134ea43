"""`timm.create_model` for commands, and the verification of whatever it reads. Importing this registers the models."""

import inspect
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
from timm.models import _factory
from timm.models._hub import load_model_config_from_path
from torch import nn

from . import registry
from .checkpoints import WEIGHTS, folder_weights, parse_config, read_config
from .errors import UserError, did_you_mean
from .hub import fetch
from .models import RisottoResNet


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model` for commands: what timm refuses becomes one line that names the mend.

    Raises:
        UserError: For an unknown model (naming the nearest), arguments it does not take, or weights it cannot load.
    """
    source, architecture = parse_name(name)
    if source is None and not timm.is_model(architecture.split(".")[0]):
        known = timm.list_models() + timm.list_pretrained("risotto_*")
        raise UserError(f"unknown model {name!r}{did_you_mean(name.lower(), known)}")
    try:
        _verify_source(source, architecture, pretrained, kwargs.get("cache_dir"))
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except UserError:
        raise
    except Exception as error:  # the net, timm, safetensors and the Hub's client each raise their own kinds
        reason = str(error).split("\n")[0]
        if ours := re.match(r"RisottoResNet.__init__\(\) got an unexpected keyword argument '(.+)'", reason):
            hint = did_you_mean(ours[1], inspect.signature(RisottoResNet).parameters, count=1)
            reason = f"the net has no argument {ours[1]!r}{hint}"
        if reason.startswith("Invalid pretrained tag"):
            reason = reason.rstrip(".") + did_you_mean(name, timm.list_pretrained(f"{architecture.split('.')[0]}.*"))
        raise UserError(f"model {name}: {reason or type(error).__name__}") from None


def parse_name(name: str) -> tuple[str | None, str]:
    """Source ('hf-hub', 'local-dir' or None) and the rest of a model's name, as timm reads it.

    Raises:
        UserError: If timm knows no such source.
    """
    try:
        source, rest = timm.models.parse_model_name(name)
    except (ValueError, AssertionError) as error:
        raise UserError(str(error) or f"model name {name!r} has an unknown source") from None
    return source or None, rest


def _verify_source(source: str | None, place: str, pretrained: bool, cache_dir: str | Path | None) -> None:
    """Fetch and verify what timm is about to read: it would take pickles, too, and wait long for a missing network.

    The weights of our own architectures are left to their entry points, which verify whatever they load.
    """
    if source == "hf-hub":
        cfg, architecture, _ = _hub_config(place, cache_dir)
        if pretrained and not _is_ours(architecture):
            _refuse_other_weights(cfg, place)
            repo_id, _, revision = place.partition("@")
            fetch(repo_id, WEIGHTS, revision or None, cache_dir)
    elif source == "local-dir":
        config = read_config(Path(place))
        if pretrained and not _is_ours(config["architecture"]):
            _refuse_other_weights(config.get("pretrained_cfg", {}), place)
            folder_weights(Path(place))
    elif pretrained and not _is_ours(place):
        cfg = timm.get_pretrained_cfg(place)
        if cfg is None or not cfg.has_weights:
            return  # timm says so itself
        if not cfg.hf_hub_id or not (cfg.hf_hub_filename or WEIGHTS).endswith(".safetensors"):
            raise UserError(f"{place}: its weights are no safetensors on the Hub, and no other format is read")
        fetch(cfg.hf_hub_id, cfg.hf_hub_filename or WEIGHTS, cache_dir=cache_dir)


def _is_ours(architecture: str) -> bool:
    name = architecture.partition(".")[0]
    return timm.is_model(name) and timm.model_entrypoint(name).__module__ == registry.__name__


def _refuse_other_weights(cfg: dict[str, Any], place: str) -> None:
    """A configuration can send timm to another file than the one that is verified, a pickle even."""
    other = cfg.get("hf_hub_filename") or (cfg.get("custom_load") == "hf" and "hf")  # timm passes over other values
    if other and other != WEIGHTS:
        raise UserError(f"{place}: its config.json asks for {other!r} as weights; only {WEIGHTS} is read")


def _hub_config(model_id: str, cache_dir: str | Path | None = None) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """A Hub repository's configuration, architecture and model arguments, as timm's own loader returns them.

    It takes that loader's place in `timm.create_model("hf-hub:...")`, which reads config.json unverified before any
    entry point is called, and takes half a minute to find that there is no network. Other people's models go through
    it, too: a configuration that a cache without hashes holds is read as it is.

    Raises:
        UserError: If the file cannot be had, or is not the one that the Hub states.
    """
    repo_id, _, revision = model_id.partition("@")
    where = {"revision": revision or None, "cache_dir": cache_dir}
    parse_config(fetch(repo_id, "config.json", **where, unnamed=True), f"{model_id}/config.json")
    folder = Path(huggingface_hub.try_to_load_from_cache(repo_id, "config.json", **where)).parent
    cfg, architecture, arguments = load_model_config_from_path(folder)
    del cfg["file"]
    return {**cfg, "hf_hub_id": model_id, "source": "hf-hub"}, architecture, arguments


_factory.load_model_config_from_hf = _hub_config


def saved_arguments(name: str | None) -> dict[str, Any]:
    """Arguments of `timm.create_model` that a model folder or Hub repository was saved with; none for other names."""
    if name is None:
        return {}
    source, place = parse_name(name)
    if source == "local-dir":
        return load_model_config_from_path(place)[2]
    return _hub_config(place)[2] if source == "hf-hub" else {}
