"""The training loop: from a recipe and an output folder to a trained model folder, whatever interrupts it."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import get_pretrained_cfg
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from risotto_zoo.checkpoints import WEIGHTS, model_config, save_model
from risotto_zoo.creation import create_model, parse_name, saved_arguments
from risotto_zoo.errors import UserError
from risotto_zoo.evaluation import Evaluation, evaluate
from risotto_zoo.hub import MANIFEST
from risotto_zoo.models.resnet import OF_THE_START, RisottoResNet
from risotto_zoo.models.variants import own_cfg

from . import run_folder
from .augment import generator_of
from .console import EpochBar, epoch_line, say, summary
from .cuda_graph import GraphedStep, Step
from .data import View, loader_faults
from .distributed import World, compiling
from .optimization import build_optimizer, build_scheduler, folded_state, freeze, standardize
from .pipelines import Pipeline, build_pipeline
from .recipe import Recipe
from .state import flatten_optimizer, load_state, prefixed, restore_optimizer, save_state, unprefixed

DIVERGED = 3
CURVES_SECONDS = 20.0
AGREE_STEPS = 5  # how often processes ask each other whether to stop


class Diverged(Exception):
    """The loss stopped being a number."""


class Stopped(BaseException):
    """A signal asked the run to stop; the argument is its number. Like KeyboardInterrupt it is nobody's error."""


@dataclass
class Progress:
    """Where the run stands; everything but the weights and the optimizer that its state holds."""

    step: int = 0
    seconds: float = 0.0
    images: int = 0
    waited: float = 0.0
    machines: list[list[Any]] = field(default_factory=list)  # hardware, and `seconds` when it took over
    history: list[dict[str, Any]] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # images, loss, correct: this epoch


@dataclass
class Trainer:
    """All that one run is made of."""

    recipe: Recipe
    output: Path
    world: World
    view: View
    pipeline: Pipeline
    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    progress: Progress
    parameters: int  # of the net itself, without training-time extras
    arguments: dict[str, Any]  # of timm.create_model, that make the net again
    saved: float = field(default_factory=time.perf_counter)  # when its state was, or when it was made

    @property
    def name(self) -> str:
        return self.model.pretrained_cfg["architecture"]

    @property
    def config(self) -> dict[str, Any]:
        return model_config(self.model, self.pipeline.classes, asdict(self.view), self.arguments)


def train(recipe: Recipe, output: Path, world: World, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Run a recipe, from the start or from the state found in `output`, and return its results.

    Raises:
        UserError: For anything the user can mend, a device out of memory included.
        Diverged: On a non-finite loss; the last good state is kept.
        Stopped: After SIGTERM or Ctrl-C, the state saved.
    """
    faults = loader_faults(f"reading {recipe.data.source}", "set a smaller data.workers")
    with StopSignals() as stop, _enough_memory(), faults, compiling(recipe.compile), ExitStack() as held:
        if world.main:
            held.enter_context(run_folder.no_empty_folder(output))
            run_folder.check_output(output, recipe, overwrite, resume or recipe.resume == "auto")
            held.enter_context(run_folder.locked(output))
            # Another process may have begun, and ended, a run there before the lock was free.
            run_folder.check_output(output, recipe, overwrite, resume or recipe.resume == "auto")
        trainer = build(recipe, output, world)
        if number := world.largest(stop.number):
            raise Stopped(number)
        if world.main:
            with _writing(output, "what it held is untouched. Make room and run the same command again"):
                run_folder.begin(output, recipe, overwrite)
        world.barrier()
        _resume(trainer)
        hardware, machines = run_folder.hardware(world.device, world.size), trainer.progress.machines
        if machines and machines[-1][0] != hardware and world.main:
            say(f"it was on {machines[-1][0]} and goes on on {hardware}, which may round otherwise")
        if not machines or machines[-1][0] != hardware:
            machines.append([hardware, trainer.progress.seconds])
        return _loop(trainer, stop)


@contextmanager
def _enough_memory() -> Iterator[None]:
    """A device out of memory, in one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            "the device is out of memory; set a smaller batch_size or a larger accumulate, or train less at once"
        ) from None


@contextmanager
def _writing(output: Path, rest: str | None = None) -> Iterator[None]:
    """A full disk or a folder gone read-only, in one line."""
    try:
        yield
    except OSError as error:
        rest = rest or f"{_kept(output)}. Make room; the same command, without --overwrite, goes on"
        raise UserError(f"{output} could not be written ({error.strerror or error}); {rest}") from None


def _kept(output: Path) -> str:
    folder = output / "state"
    return f"the last good state is kept in {folder}" if any(folder.glob("step-*.json")) else "no state was saved yet"


def build(recipe: Recipe, output: Path, world: World) -> Trainer:
    """Data, model and optimizer of a recipe, before the first step."""
    torch.manual_seed(recipe.seed)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.tf32
        torch.backends.cudnn.benchmark = True
    args = dict(recipe.model_args)
    wanted_classes = args.pop("num_classes", None)
    if recipe.init_from is not None:
        source, place = parse_name(recipe.init_from)
        if source == "local-dir" and Path(place).resolve() == output.resolve():
            raise UserError(f"the output {output} is what init_from starts from; choose another with --output")
        if (idle := args.keys() & OF_THE_START) and world.main:
            say(f"model_args: {', '.join(sorted(idle))} of a start, which the weights of {recipe.init_from} replace")
        args = {key: value for key, value in args.items() if key not in OF_THE_START}
        model = create_model(recipe.init_from, pretrained=True, **args)
        config = model.pretrained_cfg
    else:
        config = _registered_config(recipe.model)
    view = _view(recipe, config)
    pipeline = build_pipeline(recipe, view, world)
    if world.main and pipeline.unreadable:
        say(f"{len(pipeline.unreadable)} images could not be read and are left out:")
        for line in pipeline.unreadable:
            say(f"  {line}")
    classes = len(pipeline.classes)
    if wanted_classes not in (None, classes):
        raise UserError(f"model_args.num_classes is {wanted_classes}, but {recipe.data.source} has {classes} classes")
    if (recipe.augment.mixup or recipe.augment.cutmix) and classes < 2:
        raise UserError("augment: mixup and cutmix have nothing to mix with one class")
    torch.manual_seed(recipe.seed)
    if recipe.init_from is None:
        model = create_model(recipe.model, **{"num_classes": classes, "in_chans": view.input_size[0], **args})
    else:
        model.reset_classifier(classes)
    if recipe.freeze:
        freeze(model, recipe.freeze)
    parameters = sum(p.numel() for p in model.parameters())
    if recipe.weight_standardization:
        standardize(model)
    if recipe.sync_bn and world.device.type != "cuda":
        raise UserError("sync_bn: torch synchronizes batch norm on CUDA devices only; set sync_bn=false")
    if recipe.sync_bn and world.size > 1:
        model = convert_sync_batchnorm(model)
    model.to(world.device, memory_format=torch.channels_last if recipe.channels_last else torch.contiguous_format)
    _try(model, recipe, view, classes, world.device)
    optimizer = build_optimizer(model, recipe, capturable=_graphed(recipe, world))
    arguments = {**saved_arguments(recipe.init_from), **args}
    return Trainer(
        recipe=recipe,
        output=output,
        world=world,
        view=view,
        pipeline=pipeline,
        model=model,
        ema=ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, recipe, pipeline.steps_per_epoch),
        scaler=torch.amp.GradScaler(world.device.type, enabled=recipe.amp == "float16"),
        progress=Progress(),
        parameters=parameters,
        arguments={key: value for key, value in arguments.items() if key not in ("seed", "num_classes", "in_chans")},
    )


def _registered_config(name: str) -> dict[str, Any]:
    """Of a net of the zoo that of the net itself: what a recipe trains does not depend on what is released."""
    if own := own_cfg(name.split(".")[0]):
        return own
    config = get_pretrained_cfg(name.split(".")[0])
    if config is None:
        create_model(name)  # says what is wrong with the name
        raise UserError(f"model {name} has no data configuration")
    return config.to_dict()


def _view(recipe: Recipe, config: dict[str, Any]) -> View:
    resolved = resolve_data_config(pretrained_cfg=config, use_test_size=False, verbose=False)
    side = recipe.data.image_size or resolved["input_size"][1]
    channels = recipe.model_args.get("in_chans", resolved["input_size"][0])
    if channels not in (1, 3):
        raise UserError(f"model_args.in_chans is {channels}, but images have 1 (grey) or 3 (RGB) channels")
    stored, seen = recipe.data.stored_size or side, recipe.data.train_size or side
    if recipe.data.pipeline == "resident" and stored < seen:
        raise UserError(f"data.stored_size: images of {stored} px are smaller than the {seen} px that the net sees")
    if recipe.augment.shift >= stored:
        raise UserError(f"augment.shift: it must be smaller than the images of {stored} px")
    if recipe.augment.cutout > seen:
        raise UserError(f"augment.cutout: it is larger than the training images of {seen} px")
    crop = recipe.data.crop_pct if recipe.data.crop_pct is not None else resolved["crop_pct"]
    made_for = recipe.model_args.get("img_size", config["input_size"][1])
    fixed = config.get("fixed_input_size") and not recipe.model_args.get("dynamic_img_size")
    if fixed and (side != made_for or seen != made_for):
        raise UserError(
            f"{recipe.init_from or recipe.model} takes images of {made_for} px alone; set data.image_size={made_for}, "
            f"or model_args.img_size={side} to make it for these"
        )
    return View.of({**resolved, "input_size": (channels, side, side), "crop_pct": crop})


@torch.no_grad()
def _try(model: nn.Module, recipe: Recipe, view: View, classes: int, device: torch.device) -> None:
    """Refuse a net that makes nothing of the images, before anything that the output folder holds is replaced."""
    name, side = recipe.init_from or recipe.model, view.input_size[1]
    model.eval()
    for key, size in {"data.train_size": recipe.data.train_size or side, "data.image_size": side}.items():
        try:
            logits = model(torch.zeros(1, view.input_size[0], size, size, device=device))
            if logits.shape != (1, classes):
                raise ValueError(f"it gives values of shape {tuple(logits.shape)} for {classes} classes")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each net has its own way to fail
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{name} makes nothing of images of {size} px ({reason}); set {key}, or another model"
            ) from None
    model.train()


def _graphed(recipe: Recipe, world: World) -> bool:
    return recipe.cuda_graph and world.device.type == "cuda" and world.size == 1


def _loop(trainer: Trainer, stop: "StopSignals") -> dict[str, Any]:
    recipe, world, progress = trainer.recipe, trainer.world, trainer.progress
    module = trainer.model
    if recipe.compile:
        module = torch.compile(module)
    if world.size > 1:
        # Running statistics are each process's own: the first one's would replace all others' here and at every step.
        devices = [world.device] if world.device.type == "cuda" else None
        module = DistributedDataParallel(module, devices, broadcast_buffers=False)
    if world.main:
        say(
            f"{trainer.name}, {trainer.parameters / 1e6:.2f} M parameters, "
            f"on {run_folder.hardware(world.device, world.size)}: "
            f"{trainer.pipeline.train_size} training and {trainer.pipeline.val_size} validation images of "
            f"{len(trainer.pipeline.classes)} classes, {'x'.join(map(str, trainer.view.input_size))}, "
            f"{recipe.epochs} epochs of {trainer.pipeline.steps_per_epoch} steps"
        )
    update: Step = partial(_update, trainer, module)
    if _graphed(recipe, world):
        update = GraphedStep(update, trainer.optimizer)
    board = _tensorboard(trainer)
    last_curves = time.perf_counter()
    outcome = None
    while len(progress.history) < recipe.epochs:
        _train_epoch(trainer, update, stop)
        if world.size > 1:  # one net for all: running statistics are each process's own while training
            for net in _nets(trainer):
                distribute_bn(net, world.size, reduce=True)
        epoch = len(progress.history) + 1
        outcome = None
        if epoch % recipe.val_every == 0 or epoch == recipe.epochs:
            outcome = _validate(trainer, stop)
        row = _row(trainer, outcome)
        progress.history.append(row)
        progress.sums = [0.0, 0.0, 0.0]
        saving = epoch % recipe.save_every == 0 or epoch == recipe.epochs or _due(trainer)
        if saving:
            _save(trainer)
        if not world.main:
            continue
        with _writing(trainer.output):
            run_folder.write_metrics(trainer.output, progress.history)
            if time.perf_counter() - last_curves > CURVES_SECONDS:
                _curves(trainer)
                last_curves = time.perf_counter()
            if saving or epoch == 1:
                _export(trainer)
            if board is not None:
                for key, value in row.items():
                    if value is not None:
                        board.add_scalar(key, value, progress.step)
                board.flush()
        say(epoch_line(row, recipe.epochs))
    if outcome is None:  # resumed after the last epoch
        outcome = _validate(trainer, stop)
    return _finish(trainer, *outcome)


def _train_epoch(trainer: Trainer, update: Step, stop: "StopSignals") -> None:
    """The steps that are left of the epoch the run is in; saves on the way when it is time or a signal came."""
    recipe, world, progress = trainer.recipe, trainer.world, trainer.progress
    epoch, steps = len(progress.history), trainer.pipeline.steps_per_epoch
    trainer.model.train()
    for layer in trainer.model.modules():  # frozen layers keep their running statistics, too
        frozen = any(not parameter.requires_grad for parameter in layer.parameters(recurse=False))
        if frozen and isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    sums = torch.tensor(progress.sums, device=world.device)
    bad_step = torch.tensor(-1, device=world.device)
    batches = trainer.pipeline.epoch(epoch, progress.step - epoch * steps)
    with EpochBar(epoch, recipe.epochs, steps, progress.step, recipe.log_every, world.main) as bar:
        while progress.step < (epoch + 1) * steps:
            before = time.perf_counter()
            images, targets = next(batches)
            progress.waited += time.perf_counter() - before
            loss, correct = _step(trainer, update, images, targets)
            bad_step = torch.where((bad_step < 0) & ~loss.isfinite(), progress.step, bad_step)
            sums += torch.stack([torch.full_like(loss, len(images)), loss * len(images), correct])
            progress.step += 1
            progress.images += len(images) * world.size
            stopping, due = 0, False
            if world.size == 1 or progress.step % AGREE_STEPS == 0:
                stopping, due = world.largest(stop.number), _due(trainer)
            if stopping or due or progress.step % recipe.log_every == 0:
                _check_finite(trainer, bad_step)
            seconds = progress.seconds + time.perf_counter() - before
            bar.advance(sums, progress.images / seconds, recipe.batch_size)
            # Saving does not count; all that waits for the device does.
            progress.seconds += time.perf_counter() - before
            if stopping or due:
                progress.sums = sums.tolist()
                _save(trainer)
            if stopping:
                _export(trainer)
                raise Stopped(stopping)
        before = time.perf_counter()
        _check_finite(trainer, bad_step)  # waits for the device
        progress.seconds += time.perf_counter() - before
    progress.sums = world.sum(sums).tolist()


def _step(trainer: Trainer, update: Step, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One optimizer step; returns the mean loss and the number of correct answers, both of this process."""
    recipe, world, progress = trainer.recipe, trainer.world, trainer.progress
    trainer.scheduler.step_update(progress.step)
    # Dropout and stochastic depth draw from the global generators: a function of seed, rank and step, so that a
    # resumed run draws the same.
    torch.manual_seed(generator_of(recipe.seed, "step", progress.step, world.rank).initial_seed())
    outcome = update(images, targets)
    if trainer.ema is not None:
        trainer.ema.update(trainer.model, step=progress.step)
    return outcome


def _update(trainer: Trainer, module: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The part of a step that a CUDA graph can hold: forward, backward, and the optimizer."""
    recipe, world = trainer.recipe, trainer.world
    if recipe.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    total, correct = images.new_zeros(()), images.new_zeros(())
    parts = zip(images.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True)
    for i, (part, wanted) in enumerate(parts):
        last = i == recipe.accumulate - 1
        quiet = module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()
        autocast = torch.autocast(world.device.type, getattr(torch, recipe.amp)) if recipe.amp else nullcontext()
        with quiet:
            with autocast:
                logits = module(part)
            loss = F.cross_entropy(logits.float(), wanted, label_smoothing=recipe.label_smoothing)
            trainer.scaler.scale(loss / recipe.accumulate).backward()
        total += loss.detach() / recipe.accumulate
        correct += (logits.detach().argmax(1) == wanted.argmax(1)).sum()
    if recipe.clip is not None:
        trainer.scaler.unscale_(trainer.optimizer)
        # AGC leaves the classifier alone (arXiv 2102.06171): one that starts at zero would stay there.
        head = trainer.model.get_classifier() if recipe.clip.mode == "agc" else ()
        heads = head if isinstance(head, tuple) else (head,)
        spared = {id(parameter) for part in heads for parameter in part.parameters()}
        parameters = [p for p in trainer.model.parameters() if p.grad is not None and id(p) not in spared]
        dispatch_clip_grad(parameters, recipe.clip.value, mode=recipe.clip.mode)
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.optimizer.zero_grad(set_to_none=True)
    return total, correct


def _validate(trainer: Trainer, stop: "StopSignals") -> list[Evaluation]:
    """Evaluate the raw weights and, if there are any, the averaged ones, in float32."""
    world = trainer.world

    def batches() -> Any:
        for batch in trainer.pipeline.validation():
            if stop.number and world.size == 1:  # the weights have not moved since the last step: save and go
                _save(trainer)
                _export(trainer)
                raise Stopped(stop.number)
            yield batch

    return [evaluate(net, batches(), world.sum) for net in _nets(trainer)]


def _nets(trainer: Trainer) -> list[nn.Module]:
    """The net and, if there is one, that of averaged weights."""
    return [trainer.model] + ([trainer.ema.module] if trainer.ema is not None else [])


def _row(trainer: Trainer, outcome: list[Evaluation] | None) -> dict[str, Any]:
    """The epoch's metrics, None for those of a validation that it did not have."""
    progress = trainer.progress
    images, loss, correct = progress.sums
    raw, averaged = (outcome[0], outcome[-1]) if outcome else (None, None)
    of_average = {"ema_loss": averaged and averaged.loss, "ema_top1": averaged and averaged.top1}
    return {
        "epoch": progress.step // trainer.pipeline.steps_per_epoch,
        "step": progress.step,
        "train_loss": loss / max(images, 1),
        "train_top1": correct / max(images, 1),
        "val_loss": raw and raw.loss,
        "val_top1": raw and raw.top1,
        "val_top5": raw and raw.top5,
        **(of_average if trainer.ema is not None else {}),
        "lr": max(group["lr"] for group in trainer.optimizer.param_groups),
        "images_per_second": progress.images / max(progress.seconds, 1e-9),
        "data_wait": progress.waited / max(progress.seconds, 1e-9),
        "seconds": progress.seconds,
    }


def _check_finite(trainer: Trainer, bad_step: Tensor) -> None:
    """Stop before anything is saved if a loss, or a weight by now, is not a number."""
    step = int(bad_step)
    if step < 0 and not all(p.isfinite().all() for p in trainer.model.parameters()):
        step = trainer.progress.step - 1
    step = trainer.world.largest(step)
    if step < 0:
        return
    trainer.scheduler.step_update(step)
    rate = trainer.optimizer.param_groups[0]["lr"]
    raise Diverged(
        f"the loss is not finite at step {step} (epoch {step // trainer.pipeline.steps_per_epoch + 1}, learning rate "
        f"{rate:.3g}); {_kept(trainer.output)}. Usual mends: a smaller optimizer.lr, a longer warmup_epochs, "
        "clip: {mode: norm, value: 1}, amp: null"
    )


# --- saving, resuming, finishing


def _statistics(trainer: Trainer) -> list[Tensor]:
    """Running means and variances, which are each process's own while it trains."""
    named = [pair for net in _nets(trainer) for pair in net.named_buffers()]
    return [buffer for name, buffer in named if name.endswith(("running_mean", "running_var"))]


def _due(trainer: Trainer) -> bool:
    """Whether the state is as old as it may become, for one process at least."""
    return bool(trainer.world.largest(int(time.perf_counter() - trainer.saved > trainer.recipe.save_minutes * 60)))


def _save(trainer: Trainer) -> None:
    trainer.saved = time.perf_counter()
    sums = trainer.world.gather(torch.tensor(trainer.progress.sums, device=trainer.world.device))
    own = _statistics(trainer) if trainer.world.size > 1 else []
    shares = trainer.world.gather(torch.cat([buffer.flatten() for buffer in own])) if own else []
    if not trainer.world.main:
        return
    tensors, plain = flatten_optimizer(trainer.optimizer)
    tensors |= {f"statistics.{rank}": share for rank, share in enumerate(shares)}
    tensors["sums"] = torch.stack(sums)
    tensors |= prefixed("model.", trainer.model)
    if trainer.ema is not None:
        tensors |= prefixed("ema.", trainer.ema.module)
    facts = {
        "data": _data_facts(trainer),
        "progress": asdict(trainer.progress),
        "optimizer": plain,
        "scaler": trainer.scaler.state_dict(),
    }
    with _writing(trainer.output):
        save_state(trainer.output / "state", trainer.progress.step, tensors, facts)


def _resume(trainer: Trainer) -> None:
    found = load_state(trainer.output / "state")
    _check_agreement(trainer, -2 if found is None else found[0])
    if found is None:
        return
    step, tensors, facts, skipped = found
    for line in skipped:
        if trainer.world.main:
            say(f"skipped a state that does not verify: {line}")
    if step < 0:
        if trainer.world.main:
            say("no state verifies; starting again from the beginning")
        return
    if facts["data"] != _data_facts(trainer):
        raise UserError(
            f"the images or classes of {trainer.recipe.data.source}, or the size, crop, mean and deviation with which "
            f"the net sees them, have changed since {trainer.output} was begun; pass --overwrite to start again"
        )
    trainer.model.load_state_dict(unprefixed("model.", tensors))
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(unprefixed("ema.", tensors))
    own, share = _statistics(trainer), tensors.get(f"statistics.{trainer.world.rank}")
    if share is not None:
        for buffer, values in zip(own, share.split([buffer.numel() for buffer in own]), strict=True):
            buffer.copy_(values.view_as(buffer))
    restore_optimizer(trainer.optimizer, tensors, facts["optimizer"])
    if trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(facts["scaler"])
    trainer.progress = Progress(**facts["progress"])
    # Each process goes on with its own sums, or, if there are more or fewer now, one with all.
    sums = tensors.get("sums", torch.tensor([trainer.progress.sums]))  # of version 0.2.0 the state has those of all
    sums = sums if len(sums) == trainer.world.size else sums.sum(0, keepdim=True)
    mine = trainer.world.rank
    trainer.progress.sums = sums[mine].tolist() if mine < len(sums) else [0.0, 0.0, 0.0]
    trainer.scheduler.step_update(max(trainer.progress.step - 1, 0))  # the rates of the last step, which are told
    if trainer.world.main:
        say(f"resumed at step {step}, after {len(trainer.progress.history)} finished epochs")


def _check_agreement(trainer: Trainer, step: int) -> None:
    """All processes go on from one state, or none does; a disk that is not shared, or late, shows them several."""
    newest, oldest = trainer.world.largest(step), -trainer.world.largest(-step)
    if newest != oldest:
        raise UserError(
            f"the processes do not find the same state in {trainer.output / 'state'}; the output must be on storage "
            "that all machines share. If it is, start again in a minute"
        )


def _data_facts(trainer: Trainer) -> list[Any]:
    pipeline = trainer.pipeline
    facts = [pipeline.train_size, pipeline.steps_per_epoch, pipeline.classes, asdict(trainer.view), pipeline.contents]
    return json.loads(json.dumps(facts))  # as they come back from a file


def _export(trainer: Trainer, better: str = "raw") -> dict[str, str]:
    """Write the weights as plain model files, the better ones under the name that everyone loads; returns their hashes
    by name."""
    if not trainer.world.main:
        return {}
    hashes = {}
    for kind, model in zip(("raw", "ema"), _nets(trainer), strict=False):
        name = WEIGHTS if kind == better else f"model_{kind}.safetensors"
        with _writing(trainer.output):
            hashes[name] = save_model(trainer.output, folded_state(model), trainer.config, name)
    if better == "ema":
        (trainer.output / "model_ema.safetensors").unlink(missing_ok=True)  # of an earlier epoch
    return hashes


def _curves(trainer: Trainer) -> None:
    title = f"{trainer.name} on {Path(trainer.recipe.data.source).name}"
    run_folder.write_curves(trainer.output, trainer.progress.history, title)


def _finish(trainer: Trainer, result: Evaluation, averaged: Evaluation | None = None) -> dict[str, Any]:
    recipe, world, progress = trainer.recipe, trainer.world, trainer.progress
    better = "ema" if averaged is not None and averaged.top1 > result.top1 else "raw"
    hashes = _export(trainer, better)
    memory = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else _peak_memory()
    results = {
        "model": trainer.name,
        "data": recipe.data.source,
        "train_images": trainer.pipeline.train_size,
        "epochs": recipe.epochs,
        "seed": recipe.seed,
        "raw": asdict(result),
        **({"ema": asdict(averaged), "better": better} if averaged is not None else {}),
        **({"init_revision": MANIFEST[recipe.init_from]["revision"]} if recipe.init_from in MANIFEST else {}),
        "hardware": _hardware(progress),
        "train_seconds": progress.seconds,
        "train_images_per_second": progress.images / max(progress.seconds, 1e-9),
        "peak_memory_bytes": memory,
        "parameters": trainer.parameters,
        "sha256": hashes,
    }
    if world.main:
        with _writing(trainer.output):
            run_folder.write_metrics(trainer.output, progress.history)  # it may have been stopped before it was
            _curves(trainer)
            run_folder.write_results(trainer.output, results)
        ours = isinstance(trainer.model, RisottoResNet) and not recipe.data.holdout
        say(summary(trainer.output, results, ours))
    world.barrier()
    return results


def _hardware(progress: Progress) -> str:
    """What the run ran on; of several machines, each with its time."""
    names, starts = zip(*progress.machines, strict=True)
    if len(names) == 1:
        return names[0]
    minutes = [(end - start) / 60 for start, end in zip(starts, [*starts[1:], progress.seconds], strict=True)]
    return ", then ".join(f"{name} ({time:.0f} min)" for name, time in zip(names, minutes, strict=True))


def _peak_memory() -> int:
    """Of this process, whatever else it did before this run."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _tensorboard(trainer: Trainer) -> Any:
    if not trainer.recipe.tensorboard or not trainer.world.main:
        return None
    from torch.utils.tensorboard import SummaryWriter

    # What it logged after the state that it goes on from comes again.
    return SummaryWriter(trainer.output / "tensorboard", purge_step=trainer.progress.step + 1)


class StopSignals:
    """Remembers SIGTERM and Ctrl-C until the loop is at a place where it can save; another one later stops at once.

    One that comes within a second is the same wish: a process group's and its parent's, say.
    """

    def __init__(self) -> None:
        self.number, self.since = 0, 0.0

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.number and kind is None:  # it came after the last place to save: whoever waits for it has it now
            signal.raise_signal(self.number)

    def _note(self, number: int, _frame: Any) -> None:
        if not self.number:
            self.number, self.since = int(number), time.monotonic()
        elif time.monotonic() - self.since > 1:
            raise KeyboardInterrupt
