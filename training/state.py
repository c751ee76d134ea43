"""The state of a run on disk, from which it goes on as if nothing had happened.

A state is two files: `step-N.safetensors` holds every tensor, `step-N.json` the rest, with checksums of both. Each is
written to a temporary file, flushed and renamed, the JSON last: a state exists once its JSON does. The last two are
kept. Random numbers need no saving: order, augmentation and dropout of a step are functions of seed, rank and step.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from risotto_zoo.files import sha256, write_atomically

KEEP = 2


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the state of a step atomically and drop all but the last two.

    Raises:
        OSError: If it cannot be written (a full disk); what was there before is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"step-{step:09d}"
    data = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()})
    write_atomically(folder / f"{stem}.safetensors", data)
    record = {"step": step, "sha256": sha256(data), "facts": facts}
    record["checksum"] = _checksum(record)
    write_atomically(folder / f"{stem}.json", json.dumps(record).encode())
    for old in sorted(folder.glob("step-*.json"))[:-KEEP]:
        old.unlink(missing_ok=True)
        old.with_suffix(".safetensors").unlink(missing_ok=True)
    for leftover in folder.glob("*.tmp"):
        leftover.unlink(missing_ok=True)


def load_state(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any], list[str]] | None:
    """The newest state that verifies: step, tensors, facts, and a line on each newer one that was skipped.

    Returns None if the folder holds no state at all or none that verifies; then nothing is lost but time.
    """
    skipped: list[str] = []
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        try:
            record = json.loads(path.read_bytes())
            checksum = record.pop("checksum")
            if checksum != _checksum(record):
                raise ValueError("its checksum does not match")
            data = path.with_suffix(".safetensors").read_bytes()
            if sha256(data) != record["sha256"]:
                raise ValueError("the tensors do not match their checksum (truncated or damaged)")
            return record["step"], safetensors.torch.load(data), record["facts"], skipped
        except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            skipped.append(f"{path.name}: {error}")
    return (-1, {}, {}, skipped) if skipped else None


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors by name and plain values: {index: {key: value}}."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    return tensors, plain


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what `flatten_optimizer` gave; the groups' settings are the recipe's and the schedule's."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in plain.items()}
    for name, value in unprefixed("optimizer.", tensors).items():
        index, _, key = name.partition(".")
        like = parameters[int(index)]
        if value.shape == like.shape:  # in the parameter's memory format, or the next step rounds differently
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in module.state_dict().items()}


def unprefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _checksum(record: dict[str, Any]) -> str:
    return sha256(json.dumps(record, sort_keys=True).encode())
