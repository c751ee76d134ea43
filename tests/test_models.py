"""The models are timm models: everything timm's users and tools rely on works for each of them."""

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.data import resolve_data_config
from timm.models import group_parameters
from torch.ao.quantization import fuse_modules
from torch.fx.experimental.optimization import fuse

NAMES = timm.list_models("risotto_*")
SMALL = ["risotto_resnet20", "risotto_resnet20_c", "risotto_resnet20_bn", "risotto_resnet18", "risotto_resnet18_bn"]
SMALL += ["risotto_resnet50", "risotto_resnet18_cifar_c", "risotto_resnet50_cifar"]
IMAGENET = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
# Every name with --slow, one of each kind otherwise.
EVERY = [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in NAMES]
CIFAR = [f"resnet{depth}" for depth in (20, 32, 44, 56, 110)] + ["resnet18_cifar", "resnet50_cifar"]


def images(model, batch=2, size=None):
    channels, side, _ = model.default_cfg["input_size"]
    side = size or (64 if side > 32 else 16)
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_the_names():
    assert set(NAMES) == {f"risotto_{net}{suffix}" for net in IMAGENET + CIFAR for suffix in ("", "_c", "_bn")}
    assert timm.list_models(module="registry") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_describes_the_model(name):
    model = timm.create_model(name, device="meta")
    cfg = model.default_cfg
    assert cfg["architecture"] == name
    assert model.get_submodule(cfg["classifier"]).out_features == cfg["num_classes"] == model.num_classes
    assert model.get_submodule(cfg["first_conv"]).in_channels == cfg["input_size"][0]
    reduction = model.feature_info[-1]["reduction"]
    assert cfg["pool_size"] == tuple(side // reduction for side in cfg["input_size"][1:])
    with torch.no_grad():
        features = model.eval().forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert resolve_data_config(model=model)["input_size"] == cfg["input_size"]


@pytest.mark.parametrize("name", NAMES)
def test_shapes_parameters_and_norms(name):
    model = timm.create_model(name, device="meta")
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    alphas = [key for key, _ in model.named_parameters() if key.endswith("alpha")]
    blocks = sum(len(getattr(model, f"layer{i}")) for i in range(1, 5))
    projections = [key for key, _ in model.named_parameters() if "downsample.0.weight" in key]
    if name.endswith("_bn"):
        assert norms and not alphas and model.conv1.bias is None
    else:
        assert not norms and len(alphas) == blocks and model.conv1.bias is not None
        assert not any(isinstance(m, torch.nn.MaxPool2d) for m in model.modules())
    if name.endswith("_c"):
        assert len(projections) == blocks


@pytest.mark.parametrize("name", [f"risotto_{net}_bn" for net in IMAGENET])
def test_bn_weights_load_into_plain_timm(name):
    theirs = timm.create_model(name.removeprefix("risotto_").removesuffix("_bn"))
    model = timm.create_model(name).eval()
    assert list(theirs.state_dict()) == list(model.state_dict())
    theirs.load_state_dict(model.state_dict())
    x = images(model, 1)
    assert torch.equal(theirs.eval()(x), model(x))


@pytest.mark.parametrize("name", EVERY)
def test_forward_and_backward_reach_every_parameter(name):
    model = timm.create_model(name, num_classes=7).train()
    out = model(images(model, 4))
    assert out.shape == (4, 7) and out.isfinite().all()
    out.square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", EVERY)
def test_features_in_every_form_agree(name):
    model = timm.create_model(name, seed=0).eval()
    x = images(model)
    features, maps = model.forward_intermediates(x)
    assert torch.equal(features, model.forward_features(x))
    assert torch.equal(maps[-1], features)
    assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2
    (second,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(second, maps[1])

    backbone = timm.create_model(name, seed=0, features_only=True).eval()
    listed = backbone(x)
    assert len(listed) == len(maps)
    for ours, theirs, channels, reduction in zip(
        maps, listed, backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert ours.shape == (2, channels, x.shape[2] // reduction, x.shape[3] // reduction)
    chosen = timm.create_model(name, seed=0, features_only=True, out_indices=(1, -1)).eval()(x)
    assert torch.equal(chosen[0], maps[1]) and torch.equal(chosen[1], maps[-1])
    getter = timm.create_model(name, seed=0, features_only=True, feature_cls="getter", out_indices=(1, 2)).eval()
    assert torch.equal(getter(x)[1], maps[2])
    assert len(getter.model.layer3) == 0 and isinstance(getter.model.fc, torch.nn.Identity)


@pytest.mark.parametrize("name", EVERY)
def test_head(name):
    model = timm.create_model(name, seed=0).eval()
    x = images(model)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features) and torch.equal(model.fc(pooled), model(x))
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(17)
    assert model(x).shape == (2, 17)
    gram = model.fc.weight @ model.fc.weight.T / 2  # [U, -U] with orthonormal rows
    torch.testing.assert_close(gram, torch.eye(17), atol=1e-5, rtol=0)
    model.reset_classifier(5, "catavgmax")
    assert model(x).shape == (2, 5) and not any(part.training for part in model.modules())
    for part in model.fc.weight.chunk(2, dim=1):  # each pool has pairs of its own
        torch.testing.assert_close(*(sign * half for sign, half in zip((1, -1), part.chunk(2, dim=1), strict=True)))
    model.double().reset_classifier(3)
    assert model.fc.weight.dtype == torch.float64
    assert model.global_pool.pool_type == "catavgmax"
    assert timm.create_model(name, num_classes=0, global_pool="")(x).shape == features.shape


@pytest.mark.parametrize("name", ["risotto_resnet20", "risotto_resnet50_cifar"])
@pytest.mark.parametrize("init", ["risotto", "fixup"])
def test_training_computes_what_evaluation_does(name, init):
    """In training alpha goes into the kernel, in evaluation it stays outside."""
    model = timm.create_model(name, init=init, seed=0, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            parameter.data.uniform_(0.2, 0.8, generator=draw)
        elif init == "fixup" and not parameter.any():  # its last convolutions and the head start at zero
            parameter.data.normal_(0, 0.1, generator=draw)
    x = images(model).double()
    torch.testing.assert_close(model.train()(x), model.eval()(x))


@pytest.mark.parametrize("name", ["risotto_resnet20", "risotto_resnet50_cifar"])
def test_a_dropped_branch_leaves_the_skip(name):
    model = timm.create_model(name, seed=0, drop_path_rate=0.5).train()
    block = model.layer1[-1]
    block.drop_path.drop_prob = 1.0
    x = torch.randn(2, block.conv1.in_channels, 4, 4)
    assert torch.equal(block(x), x.relu())
    assert not torch.equal(block.eval()(x), x.relu())


def test_gradient_checkpointing_runs_blocks_again():
    model = timm.create_model("risotto_resnet20").train()
    model.set_grad_checkpointing()
    runs = []
    model.layer2[1].register_forward_pre_hook(lambda *_: runs.append(1))
    model(images(model)).sum().backward()
    assert len(runs) == 2
    model.forward_intermediates(images(model))[0].sum().backward()
    assert len(runs) == 4


@pytest.mark.parametrize("name", EVERY)
def test_gradient_checkpointing_changes_nothing(name):
    model = timm.create_model(name, seed=0).double().train()
    if name.endswith("_bn"):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0  # recomputing would count a batch twice
    x = images(model).double()
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for before, parameter in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, before)


@pytest.mark.parametrize("name", EVERY)
def test_groups_order_stem_stages_head(name):
    model = timm.create_model(name)
    groups = group_parameters(model, model.group_matcher(coarse=True))
    stages = sum(1 for i in range(1, 5) if len(getattr(model, f"layer{i}")))
    assert sorted(groups) == list(range(stages + 2))
    assert all(key.startswith(("conv1", "bn1", "maxpool")) for key in groups[0])
    assert all(key.startswith("fc") for key in groups[stages + 1])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", EVERY)
def test_torchscript_and_fx(name):
    model = timm.create_model(name, scriptable=True).eval()
    x = images(model)
    expected = model(x)
    assert torch.equal(torch.jit.script(model)(x), expected)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), expected)
    traced.train()(x).sum().backward()


@pytest.mark.parametrize("name", ["risotto_resnet20", "risotto_resnet50"])
def test_compile_and_export(name):
    model = timm.create_model(name).eval()
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("name", EVERY)
def test_channels_last_and_autocast(name):
    model = timm.create_model(name, seed=0).eval()
    x = images(model)
    expected = model(x)
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["risotto_resnet20", "risotto_resnet50"])
def test_options_reach_the_net(name):
    model = timm.create_model(
        name, init="he", alpha=0.5, seed=0, num_classes=10, in_chans=1, drop_path_rate=0.1, drop_rate=0.2
    )
    assert model.conv1.in_channels == 1 and model.fc.out_features == 10 and model.drop_rate == 0.2
    assert all(p == 0.5 for key, p in model.named_parameters() if key.endswith("alpha"))
    assert any(getattr(m, "drop_prob", 0) for m in model.modules())
    assert timm.create_model(name, dtype=torch.bfloat16).conv1.weight.dtype == torch.bfloat16


def test_output_stride_dilates():
    model = timm.create_model("risotto_resnet18", output_stride=8, features_only=True)
    assert model.feature_info.reduction() == [2, 4, 8, 8, 8]
    assert model(torch.randn(1, 3, 64, 64))[-1].shape[-1] == 8
    small = timm.create_model("risotto_resnet20", output_stride=2, features_only=True)  # its stem keeps the size
    assert small.feature_info.reduction() == [1, 1, 2, 2]
    assert small(torch.randn(1, 3, 32, 32))[-1].shape[-1] == 16


@pytest.mark.parametrize("options", [{"num_classes": 5}, {"num_classes": 10}, {}])
def test_a_head_is_adapted_as_timms_scripts_ask_for_it(options, tmp_path):
    """Their `--pretrained-path` comes as an overlay with num_classes -1, which is no number of the file's classes."""
    source = timm.create_model("risotto_resnet20", num_classes=10, seed=7)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": -1}
    model = timm.create_model("risotto_resnet20", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    for key, value in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, source.state_dict()[key]), key
    # A new head is RISOTTO's own: semi-orthogonal, and the same again with the other sign.
    torch.testing.assert_close(model.fc.weight[:, :32], -model.fc.weight[:, 32:])
    values = torch.linalg.svdvals(model.fc.weight[:, :32].double())
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "risoto"}, "did you mean 'risotto'"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"skip": "none"}, "skip must be one of"),
        ({"alpha": 0.0}, "alpha=0"),
        ({"init": "he", "alpha": float("nan")}, "not a finite number"),
        ({"rotated_pairs": 0}, "rotated_pairs is 0"),
        ({"init": "skipinit", "rotated_pairs": 2}, "is of init='risotto', not of 'skipinit'"),
        ({"init": "he", "patches": True}, "patches is of init='risotto', not of 'he'"),
        ({"output_stride": 3}, "output_stride must be one of"),
        ({"features_only": True, "out_indices": (1, 4)}, r"feature maps 0 \(its stem's\) to 3"),
        ({"features_only": True, "out_indices": 5}, r"feature maps 0 \(its stem's\) to 3"),
        ({"layers": (1, 1), "channels": (16, 32, 64)}, "one to four"),
        ({"layers": (1,), "channels": (16,)}, "two in all"),
        ({"layers": (2, 2, 0)}, "at least one block in the last"),
        ({"pretrained": True, "init": "risoto"}, "did you mean 'risotto'"),
        ({"pretrained": True, "rotated_pairs": 0}, "rotated_pairs is 0"),
        ({"pretrained": True, "patches": "no"}, "patches is 'no', not True or False"),
        ({"pretrained": True, "alpha": float("nan")}, "alpha is nan, not a finite number"),
        ({"pretrained": True, "init": "he", "patches": True}, "patches is of init='risotto', not of 'he'"),
        ({"seed": 1.5}, "seed is 1.5, not a whole number"),
        ({"seed": 2**70}, "seed is 1180591620717411303424, not a whole number"),
    ],
)
def test_wrong_options_say_what_is_right(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("risotto_resnet20", **options)


def test_numbers_of_numpy_are_numbers():
    options = {"alpha": np.float32(0.5), "drop_rate": np.float32(0.25), "seed": np.int64(3)}
    model = timm.create_model("risotto_resnet20", **options)
    assert model.layer1[0].alpha == 0.5 and model.drop_rate == 0.25
    assert torch.equal(model.conv1.weight, timm.create_model("risotto_resnet20", seed=3).conv1.weight)


@pytest.mark.parametrize("options", [{}, {"num_classes": 3}, {"features_only": True}])
def test_the_start_is_void_beside_weights_whatever_else_is_asked(options):
    plain, started = (
        timm.create_model("risotto_resnet20.cifar10-jpeg", pretrained=True, **options, **start).state_dict()
        for start in ({"seed": 0}, {"seed": 0, "alpha": 0.0, "rotated_pairs": 2})
    )
    assert plain.keys() == started.keys() and all(torch.equal(plain[key], started[key]) for key in plain)


@pytest.mark.parametrize("name", ["risotto_resnet18_bn", "risotto_resnet50_bn", "risotto_resnet20_bn"])
def test_tools_fold_every_batch_norm(name):
    model = timm.create_model(name, seed=0).eval()
    x = images(model)
    folded = fuse(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=0)
    last = "conv3" if "resnet50" in name else "conv2"
    fuse_modules(model, [[f"layer1.0.{last}", f"layer1.0.bn{last[-1]}"]])
