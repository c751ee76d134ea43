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

from risotto_zoo.errors import UserError
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
    # Later states than this one are damaged ones that were skipped; they must not count among those kept.
    kept = [path.stem for path in sorted(folder.glob("step-*.json")) if path.stem <= stem][-KEEP:]
    for path in folder.glob("step-*"):
        if path.stem not in kept and path.is_file():
            path.unlink(missing_ok=True)


def load_state(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any], list[str]] | None:
    """The newest state that verifies: step, tensors, facts, and a line on each newer one that was skipped.

    None if the folder holds no state at all; with a step of -1 and nothing but those lines if none verifies.
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
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError
        ) as error:  # fmt: skip
            skipped.append(f"{path.name}: {error}")
    return (-1, {}, {}, skipped) if skipped else None


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors by name, and the rest: plain values by parameter index, settings by group.

    Raises:
        UserError: If the optimizer keeps anything else, which a resumed run would lack.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            elif value is None or isinstance(value, (bool, int, float, str)):
                values.setdefault(str(index), {})[key] = value
            else:
                raise UserError(f"optimizer {type(optimizer).__name__} keeps state that cannot be saved; use another")
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(optimizer.param_groups):
        groups.append({})
        for key, value in group.items():
            if isinstance(value, Tensor):  # some optimizers count their steps by group
                tensors[f"group.{index}.{key}"] = value
            elif isinstance(value, (bool, int, float)) and "lr" not in key and key != "capturable":  # of the device
                groups[-1][key] = value
    return tensors, {"values": values, "groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what `flatten_optimizer` gave; learning rates are the schedule's."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in plain["values"].items()}
    for name, value in unprefixed("optimizer.", tensors).items():
        index, _, key = name.partition(".")
        like = parameters[int(index)]
        # In the parameter's memory format, or the next step rounds differently.
        if key != "step" and value.shape == like.shape:
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for group, saved in zip(optimizer.param_groups, plain["groups"], strict=True):
        group.update(saved)
    for name, value in unprefixed("group.", tensors).items():
        index, _, key = name.partition(".")
        optimizer.param_groups[int(index)][key] = value


def prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in module.state_dict().items()}


def unprefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _checksum(record: dict[str, Any]) -> str:
    return sha256(json.dumps(record, sort_keys=True).encode())
