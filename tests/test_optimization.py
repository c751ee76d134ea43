"""What a recipe's settings do to the weights, in numbers."""

import math
from functools import partial

import pytest
import timm
import timm.optim.muon
import torch
from torch import nn

from risotto_zoo.errors import UserError
from training import engine
from training.data import View
from training.distributed import World
from training.muon import by_shape, set_up_muon
from training.optimization import build_optimizer, build_scheduler, folded_state, freeze, standardize
from training.pipelines import resident_sets
from training.recipe import Recipe, differences, validate, without_places

CPU = World(0, 1, torch.device("cpu"))


def recipe(optimizer=None, **settings):
    whole = {
        "epochs": 10,
        "batch_size": 64,
        "warmup_epochs": 0,
        "model_args": {"in_chans": 1},
        "data": {"source": "digits", "image_size": 8},
        "optimizer": {"name": "momentum", "lr": 1.0, "momentum": 0.0, **(optimizer or {})},
        **settings,
    }
    return validate(whole, "test")


def after_steps(count, tmp_path, **settings):
    """A trainer after so many steps, and its weights before and after each."""
    trainer = engine.build(recipe(**settings), tmp_path, CPU)
    history = [flat(trainer.model)]
    update = partial(engine._update, trainer, trainer.model)
    for _, (images, targets) in zip(range(count), trainer.pipeline.epoch(0), strict=False):
        engine._step(trainer, update, images, targets)
        trainer.progress.step += 1
        history.append(flat(trainer.model))
    return trainer, history


def test_adaptive_clipping_leaves_the_classifier_alone(tmp_path):
    """One that starts at zero, as Fixup's, would not move else."""
    start = {"model_args": {"in_chans": 1, "init": "fixup"}}
    moved = []
    for clip in ({"mode": "agc", "value": 0.01}, None):
        trainer, _ = after_steps(1, tmp_path, clip=clip, **start)
        moved.append(trainer.model.fc.weight.norm())
    assert moved[0] == moved[1] > 0


def test_adaptive_clipping_leaves_both_classifiers_of_a_distilled_net_alone(tmp_path):
    net = {"model": "deit_tiny_distilled_patch16_224", "model_args": {"img_size": 8, "patch_size": 4, "depth": 1}}
    clipped, free = (
        after_steps(1, tmp_path, clip=clip, **net)[0].model for clip in ({"mode": "agc", "value": 1e-6}, None)
    )
    for one, other in zip(clipped.get_classifier(), free.get_classifier(), strict=True):
        assert torch.equal(one.weight, other.weight)
    assert not torch.equal(clipped.patch_embed.proj.weight, free.patch_embed.proj.weight)


def test_float16_clips_gradients_and_not_scaled_ones_and_keeps_its_scale(tmp_path):
    steps = []
    for amp in ("float16", None):
        trainer, history = after_steps(1, tmp_path, amp=amp, clip={"mode": "norm", "value": 0.001})
        steps.append((history[1] - history[0]).norm())
        if amp:
            trainer.scaler.update(1024.0)
            engine._save(trainer)
            resumed = engine.build(recipe(amp=amp), tmp_path, CPU)
            engine._resume(resumed)
            assert resumed.scaler.get_scale() == 1024
    torch.testing.assert_close(*steps, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing": 0.1},
        {"weight_standardization": True},
        {"amp": "bfloat16"},
        {"accumulate": 2, "model": "risotto_resnet20_bn"},
        {"clip": {"mode": "norm", "value": 0.1}},
        {"clip": {"mode": "agc", "value": 0.001}},
        {"augment": {"mixup": 0.5}},
        {"augment": {"cutmix": 0.5}},
        {"augment": {"cutout": 3}},
        {"augment": {"crop_scale": [0.3, 0.6]}},
        {"augment": {"shift": 2}},
        {"augment": {"flip": True}},
        {"model_args": {"in_chans": 1, "drop_path_rate": 0.5}},
        {"optimizer": {"weight_decay": 0.1}},
        {"optimizer": {"other_weight_decay": 0.1}},
        {"optimizer": {"momentum": 0.5}},
        {"optimizer": {"other_lr": 0.5}},
    ],
)
def test_every_setting_changes_the_run(settings, tmp_path):
    small = {"lr": 0.01}
    base = {"augment": {"flip": False}, **({"model": settings["model"]} if "model" in settings else {})}
    changed = {**base, **settings, "augment": {**base["augment"], **settings.get("augment", {})}}
    (_, plain) = after_steps(2, tmp_path, optimizer=small, **base)
    (_, other) = after_steps(2, tmp_path, **{**changed, "optimizer": {**small, **settings.get("optimizer", {})}})
    assert len(plain[-1]) != len(other[-1]) or not torch.allclose(plain[-1], other[-1], rtol=1e-5, atol=1e-7)


def flat(model):
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    "optimizer",
    [{}, {"name": "muon", "lr": 0.02}, {"layer_decay": 0.5}, {"name": "muon", "lr": 0.02, "layer_decay": 0.5}],
)
def test_centralized_gradients_leave_the_sums_of_kernels_alone(optimizer, tmp_path):
    """Every channel's, but for the stem's; the kernels themselves move."""

    def moved(centralize):
        settings = recipe({**optimizer, "centralize": centralize}, model="risotto_resnet20_c", accumulate=2)
        trainer = engine.build(settings, tmp_path, CPU)
        stem = f"{trainer.model.pretrained_cfg['first_conv']}.weight"
        kernels = {name: p for name, p in trainer.model.named_parameters() if p.ndim == 4}
        before = {name: p.detach().clone() for name, p in kernels.items()}
        update = partial(engine._update, trainer, trainer.model)
        for _, (images, targets) in zip(range(3), trainer.pipeline.epoch(0), strict=False):
            engine._step(trainer, update, images, targets)
        changes = {name: (p.detach() - before[name]).flatten(1) for name, p in kernels.items()}
        return changes.pop(stem), changes

    def one_sided(change):
        return change.sum(1).abs().max() / change.abs().sum(1).max()

    stem, inner = moved(True)
    assert one_sided(stem) > 0.05
    assert max(map(one_sided, inner.values())) < 0.005  # rounding: the steps of `layer_decay` are small
    _, free = moved(False)
    assert min(map(one_sided, free.values())) > 0.05


@pytest.mark.parametrize("other", [None, 0.0, 0.01])
@pytest.mark.parametrize("name", ["muon", "nmuon", "momentum"])
@pytest.mark.parametrize("model", ["risotto_resnet20", "risotto_resnet20_bn", "risotto_resnet18"])
def test_kernels_decay_and_vectors_do_not(model, name, other):
    net = timm.create_model(model, num_classes=10)
    rates = {"lr": 0.4, "other_lr": 0.3, "alpha_lr": 0.2, "weight_decay": 0.05, "other_weight_decay": other}
    optimizer = build_optimizer(net, recipe({"name": name, **rates}))
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))
    for key, parameter in net.named_parameters():
        group = found[id(parameter)]
        ends = key in ("conv1.weight", "fc.weight")
        decay = 0.05 if other is None or not ends else other
        assert group["weight_decay"] == (decay if parameter.ndim > 1 else 0.0), key
        assert group["lr"] == (0.2 if key.endswith("alpha") else 0.4 if parameter.ndim == 4 and not ends else 0.3), key
        if name != "momentum":
            assert bool(group.get("use_fallback")) == (parameter.ndim != 4 or ends), key


def test_what_timm_says_does_not_decay_does_not():
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
    for more in ({}, {"layer_decay": 0.5}):
        optimizer = build_optimizer(net, recipe({"name": "muon", "lr": 0.1, "weight_decay": 0.05, **more}))
        [group] = [g for g in optimizer.param_groups for p in g["params"] if p is net.pos_embed]
        assert group["weight_decay"] == 0 and group["use_fallback"]


def test_muon_is_nesterovs_unless_the_recipe_says_otherwise():
    net = timm.create_model("risotto_resnet20")
    for options, nesterov in (({}, True), ({"nesterov": False}, False)):
        optimizer = build_optimizer(net, recipe({"name": "muon", "options": options}))
        assert {group["nesterov"] for group in optimizer.param_groups} == {nesterov}


@pytest.mark.parametrize("model", ["risotto_resnet20", "risotto_resnet18_bn"])
def test_layer_decay_leaves_to_muon_the_kernels_alone(model):
    net = timm.create_model(model)
    optimizer = build_optimizer(net, recipe({"name": "muon", "lr": 0.4, "weight_decay": 0.05, "layer_decay": 0.5}))
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in net.named_parameters():
        group = found[id(parameter)]
        kernel = parameter.ndim == 4 and key != "conv1.weight"
        assert bool(group["use_fallback"]) != kernel, key
        assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0), key
    scales = [found[id(weight)]["lr_scale"] for weight in (net.conv1.weight, net.layer1[0].conv1.weight, net.fc.weight)]
    assert scales[0] <= 0.5 * scales[1] < 0.25 == 0.25 * scales[2]


@pytest.mark.parametrize("frozen", [1, 2, 4])
def test_frozen_parts_are_not_trained(frozen):
    net = timm.create_model("risotto_resnet20")
    freeze(net, frozen)
    kept = ("conv1.", "layer1.", "layer2.", "layer3.")[:frozen]
    assert all(p.requires_grad != key.startswith(kept) for key, p in net.named_parameters())
    with pytest.raises(UserError, match="the model has 5 parts"):
        freeze(net, 5)


def test_standardized_kernels_keep_mean_and_norm_whatever_their_directions_do():
    net = timm.create_model("risotto_resnet20", seed=0, dtype=torch.float64)
    before = {name: module.weight.detach().clone() for name, module in net.named_modules() if hasattr(module, "weight")}
    standardize(net)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if key.endswith("original0"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) + 1)
    for name, module in net.named_modules():
        if hasattr(module, "parametrizations"):
            new, old = module.weight.detach().flatten(1), before[name].flatten(1)
            assert (new - old).abs().max() > 0.01, name
            torch.testing.assert_close(new.mean(dim=1), old.mean(dim=1))
            torch.testing.assert_close(new.std(dim=1), old.std(dim=1))
    assert set(folded_state(net)) == set(timm.create_model("risotto_resnet20").state_dict())


@pytest.mark.parametrize(("amp", "single"), [(None, True), ("bfloat16", False)])
def test_the_recipe_and_not_the_machine_says_in_what_format_muon_orthogonalizes(amp, single):
    """An orthogonalized update does not depend on the gradient's scale, but for rounding."""
    moved = []
    for scale in (1.0, 3.0):
        net = timm.create_model("risotto_resnet20", num_classes=10, seed=0)
        kernel = net.layer1[0].conv1.weight
        before = kernel.detach().clone()
        optimizer = build_optimizer(net, recipe({"name": "muon", "lr": 1.0}, amp=amp))
        for parameter in net.parameters():
            parameter.grad = scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        moved.append(kernel.detach() - before)
    difference = (moved[0] - moved[1]).abs().max() / moved[0].abs().max()
    assert (difference < 1e-5) if single else (difference > 1e-4)


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ("cosine", lambda t: (1 + math.cos(math.pi * t / 100)) / 2),
        ("linear", lambda t: 1 - t / 100),
        ("constant", lambda t: 1.0),
    ],
)
def test_the_rate_warms_up_and_goes_down_as_the_schedule_says(schedule, share):
    net = timm.create_model("risotto_resnet20")
    settings = recipe({"lr": 0.4, "other_lr": 0.2}, schedule=schedule, warmup_epochs=2)
    optimizer = build_optimizer(net, settings)
    scheduler = build_scheduler(optimizer, settings, steps_per_epoch=10)
    for step in (0, 5, 10, 19, 20, 50, 75, 99):
        scheduler.step_update(step)
        wanted = step / 20 if step < 20 else share(step)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert sorted(rates) == pytest.approx([0.2 * wanted, 0.4 * wanted] if step else [0.0])


def test_a_batch_in_parts_makes_the_step_of_the_whole(tmp_path):
    _, whole = after_steps(2, tmp_path, optimizer={"lr": 0.1})
    _, parts = after_steps(2, tmp_path, optimizer={"lr": 0.1}, accumulate=4)
    step = (whole[2] - whole[0]).norm()
    assert step > 0.01 and (parts[2] - whole[2]).norm() < 1e-4 * step


def test_clipping_limits_the_norm_of_the_step(tmp_path):
    _, free = after_steps(1, tmp_path)
    _, held = after_steps(1, tmp_path, clip={"mode": "norm", "value": 0.01})
    assert (free[1] - free[0]).norm() > 0.02
    assert (held[1] - held[0]).norm().item() == pytest.approx(0.01, rel=1e-3)  # the rate is 1


def test_the_average_is_that_of_a_plain_loop(tmp_path):
    trainer, weights = after_steps(6, tmp_path, optimizer={"lr": 0.1}, ema_decay=0.4)
    average = weights[0]
    for step in range(6):  # timm's warm-up of the decay: none in the first two steps, then up to the one asked for
        decay = min(0.4, 1 - step ** (-2 / 3)) if step else 0.0
        average = decay * average + (1 - decay) * weights[step + 1]
    assert (average - weights[6]).norm() > 1e-3
    torch.testing.assert_close(flat(trainer.ema.module), average, atol=1e-6, rtol=1e-5)


def test_held_out_images_are_not_trained_on():
    view = View((1, 8, 8), (0.5,), (0.25,))
    rows = lambda images: sorted(images.images.flatten(1).tolist())  # noqa: E731
    whole, _ = resident_sets(recipe().data, view)
    train, held = resident_sets(recipe(data={"source": "digits", "image_size": 8, "holdout": 0.1}).data, view)
    assert (len(train), len(held)) == (1293, 144)
    assert sorted(rows(train) + rows(held)) == rows(whole)


@pytest.mark.parametrize("options", [{}, {"adjust_lr_fn": "original", "nesterov": False}, {"conv_mode": "batched"}])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_muon_on_stacked_kernels_does_what_timm_does(options, lr, monkeypatch):
    """Three steps, kernels of several shapes, one taller than wide, in the memory format of a GPU's training."""
    shapes = [(8, 4, 3, 3), (8, 4, 3, 3), (64, 8, 1, 1), (8, 8, 3, 3), (8, 4, 3, 3)]
    torch.manual_seed(0)
    starts, *grads = ([torch.randn(shape) for shape in shapes] for _ in range(4))
    ends = []
    set_up_muon(torch.device("cpu"), None)
    for function in (timm.optim.muon.muon, by_shape):
        monkeypatch.setattr(timm.optim.muon, "muon", function)
        params = [nn.Parameter(start.clone(memory_format=torch.channels_last)) for start in starts]
        optimizer = timm.optim.Muon(params, **{"lr": lr, "weight_decay": 0.1, "nesterov": True, **options})
        for step in range(3):
            for param, grad in zip(params, grads[step], strict=True):
                param.grad = grad.clone()
            optimizer.step()
        ends.append([param.detach() for param in params])
    for plain, stacked, start in zip(*ends, starts, strict=True):
        assert (plain - start).norm() > 0.01
        torch.testing.assert_close(plain, stacked, rtol=1e-5, atol=1e-5)


def test_what_null_stands_for_is_no_difference():
    null = Recipe.model_validate({"optimizer": {"lr": 0.1, "weight_decay": 0.2}})
    told = {"lr": 0.1, "weight_decay": 0.2, "other_lr": 0.1, "alpha_lr": 0.1, "other_weight_decay": 0.2}
    assert differences(null, Recipe.model_validate({"optimizer": told})) == []
    changed = Recipe.model_validate({"optimizer": told | {"other_weight_decay": 0.1}})
    assert differences(null, changed) == ["optimizer.other_weight_decay"]


def test_loader_processes_decide_what_streaming_draws():
    """Each draws augmentation of its own, so a run does not go on with another number of them."""
    for pipeline, found in (("resident", []), ("streaming", ["data.workers"])):
        both = [{"data": {"pipeline": pipeline, "workers": n}, "augment": {"crop_scale": [0.5, 1]}} for n in (2, 4)]
        ours, theirs = map(Recipe.model_validate, both)
        assert differences(ours, theirs) == found


def test_a_recipe_for_others_names_no_place_of_this_machine(tmp_path):
    data = {"source": "/home/me/photos", "root": "/mnt/shards"}
    told = without_places(Recipe.model_validate({"data": data, "init_from": "local-dir:/home/me/runs/first"}))
    assert (told.data.source, told.data.root, told.init_from) == ("photos", "shards", "local-dir:first")
    told = without_places(Recipe.model_validate({"data": {"source": "../../me/photos", "root": "~bob/shards"}}))
    assert (told.data.source, told.data.root) == ("photos", "shards")
    (tmp_path / "photos").symlink_to(tmp_path, target_is_directory=True)
    assert without_places(Recipe.model_validate({"data": {"source": str(tmp_path / "photos")}})).data.source == "photos"
    kept = Recipe.model_validate({"data": {"source": "hfds/cifar10", "root": "shards"}})
    assert without_places(kept) == kept
