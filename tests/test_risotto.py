"""RISOTTO is what it claims: every non-zero singular value of the signal Jacobian is 1."""

import itertools
import re
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

from risotto_zoo.initializers import he_, risotto_, risotto_head_
from risotto_zoo.initializers.risotto import identity_basic_block
from risotto_zoo.isometry import probed_singular_values, signal, signal_by_block, signal_map, singular_values
from risotto_zoo.models import BasicBlock, Bottleneck, RisottoResNet

NAMES = timm.list_models("risotto_*")
WITHOUT_NORM = [name for name in NAMES if not name.endswith("_bn")]
# The deepest, seconds each, differ from ResNet-50 in the number of blocks alone.
DEEPEST_SLOW = [
    pytest.param(name, marks=[pytest.mark.slow] * bool(re.search("101|152", name))) for name in WITHOUT_NORM
]


def spectrum(model, image):
    """Singular values and the number that must not be zero: input channels times pixels of the last map."""
    values = singular_values(signal_map(model.eval()), image)
    reduction = model.feature_info[-1]["reduction"]
    pixels = -(-image.shape[-2] // reduction) * -(-image.shape[-1] // reduction)
    rank = min(image.shape[0], model.conv1.out_channels // 2) * pixels
    return values, rank


def assert_isometric(model, image, tolerance):
    values, rank = spectrum(model, image)
    torch.testing.assert_close(values[:rank], torch.ones(rank, dtype=values.dtype), atol=tolerance, rtol=0)
    assert (values[rank:] <= tolerance).all()


@pytest.mark.parametrize("name", DEEPEST_SLOW)
def test_every_model_without_norm_is_isometric(name):
    model = timm.create_model(name, seed=0, dtype=torch.float64)
    size = model.feature_info[-1]["reduction"] * (2 if model.num_features == 64 else 1)
    generator = torch.Generator().manual_seed(1)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for _ in range(2):
            image = torch.randn(3, size, size, dtype=dtype, generator=generator)
            assert_isometric(model.to(dtype), image, tolerance)


@pytest.mark.parametrize("name", ["risotto_resnet20", "risotto_resnet20_c", "risotto_resnet50_cifar"])
@pytest.mark.parametrize(
    "options",
    [
        {"in_chans": 1},
        {"in_chans": 12},
        {"num_classes": 17},
        {"num_classes": 500},
        {"alpha": 0.5},
        {"alpha": -2.0},
        {"rotated_pairs": 1},
        {"rotated_pairs": 2, "alpha": 0.1},
        {"rotated_pairs": 9},
        {"rotated_pairs": 1000},
    ],
)
def test_odd_cases_are_isometric(name, options):
    model = timm.create_model(name, seed=0, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(options.get("in_chans", 3), 12, 8, dtype=torch.float64, generator=generator)
    assert_isometric(model, image, 1e-10)


@pytest.mark.parametrize("skip", ["identity", "projection"])
@pytest.mark.parametrize(("block", "width"), [(BasicBlock, 16), (Bottleneck, 16)])
def test_a_thousand_blocks_are_isometric(skip, block, width):
    model = RisottoResNet(block, (1000,), (width,), stem="cifar", skip=skip, num_classes=2, seed=0, dtype=torch.float64)
    image = torch.randn(3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        assert_isometric(model.to(dtype), image.to(dtype), tolerance)


def test_alpha_zero_keeps_projection_skips_isometric():
    model = timm.create_model("risotto_resnet20_c", seed=0, alpha=0.0, dtype=torch.float64)
    assert_isometric(model, torch.randn(3, 8, 8, dtype=torch.float64), 1e-10)


def test_probes_of_a_large_image_do_not_add_rounding_of_their_own():
    model = timm.create_model("risotto_resnet18", seed=0, patches=True, alpha=0.3, rotated_pairs=1).eval()
    image = torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(0))
    values = probed_singular_values(signal_map(model), image, 2)
    torch.testing.assert_close(values, torch.ones(2), atol=1e-6, rtol=0)


def test_probes_agree_with_the_exact_values_and_stay_within_them():
    image = torch.randn(3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact_one = probed_singular_values(signal_map(timm.create_model("risotto_resnet20", dtype=torch.float64)), image)
    torch.testing.assert_close(exact_one, torch.ones_like(exact_one), atol=1e-10, rtol=0)

    he = signal_map(timm.create_model("risotto_resnet20", init="he", seed=0, dtype=torch.float64).eval())
    small = image[:, :8, :8]
    exact, probed = singular_values(he, small), probed_singular_values(he, small, probes=8)
    assert exact[0] * (1 + 1e-9) >= probed[0] and probed[-1] >= exact[exact > 1e-12][-1]
    assert probed[0] > 0.5 * exact[0]


def test_exact_singular_values_agree_with_a_dense_jacobian():
    model = timm.create_model("risotto_resnet20", init="he", seed=0, dtype=torch.float64).eval()
    function, image = signal_map(model), torch.randn(3, 8, 8, dtype=torch.float64)
    dense = torch.autograd.functional.jacobian(lambda x: function(x[None])[0], image).flatten(1)
    torch.testing.assert_close(singular_values(function, image, chunk=50), torch.linalg.svdvals(dense))


@pytest.mark.parametrize("name", ["risotto_resnet56", "risotto_resnet56_c"])
def test_he_is_orders_of_magnitude_off(name):
    image = torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = singular_values(signal_map(timm.create_model(name, init="he", seed=0, dtype=torch.float64)), image)
    assert values[0] > 100 and values[0] / values[values > 0][-1] > 1e4


def test_similarity_and_norm_are_constant_by_depth_and_he_makes_images_alike():
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks = signal_by_block(timm.create_model("risotto_resnet56", seed=0, dtype=torch.float64), images)
    for block in blocks:
        assert block.similarity == pytest.approx(blocks[0].similarity, abs=1e-12)
        assert block.norm == pytest.approx(blocks[0].norm, rel=1e-12)
    odd = signal_by_block(timm.create_model("risotto_resnet20", seed=0, dtype=torch.float64), images[..., :31, :27])
    assert all(block.norm == pytest.approx(odd[0].norm, rel=1e-12) for block in odd)
    net = timm.create_model("risotto_resnet56", init="he", seed=0, dtype=torch.float64)
    he = signal_by_block(net, images)
    assert he[-1].similarity > 0.8 > he[0].similarity
    last = net.forward_features(images).detach()
    pairs = list(itertools.combinations(range(4), 2))
    for maps, similarity in ((signal(last), he[-1].similarity), (last, he[-1].activation_similarity)):
        cosines = [nn.functional.cosine_similarity(maps[i].flatten(), maps[j].flatten(), dim=0) for i, j in pairs]
        assert similarity == pytest.approx(np.mean(cosines), rel=1e-12)
    norms = signal(last).flatten(1).norm(dim=1)
    assert he[-1].norm == pytest.approx(norms.square().mean().sqrt().item(), rel=1e-12)
    assert len(signal_by_block(net, images[:2])) == 27
    faint = signal_by_block(
        timm.create_model("risotto_resnet56", init="he", seed=0, dtype=torch.float64), 1e-20 * images
    )
    assert [block.similarity for block in faint] == pytest.approx([block.similarity for block in he], abs=1e-9)
    with pytest.raises(ValueError, match="two images"):
        signal_by_block(timm.create_model("risotto_resnet20"), torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no blocks"):
        signal_by_block(timm.create_model("mobilenetv3_small_050").eval(), images.float())
    wrapped = nn.DataParallel(torchvision.models.resnet18())
    with pytest.raises(ValueError, match=r"DataParallel has neither .* pass that \(its \.module"):
        signal_map(wrapped)


def test_a_measurement_under_inference_mode_is_the_same():
    model = timm.create_model("risotto_resnet20", seed=0, dtype=torch.float64).eval()
    image = torch.randn(3, 8, 8, dtype=torch.float64)
    for measure in (singular_values, probed_singular_values):
        values = measure(signal_map(model), image)
        with torch.inference_mode():
            assert torch.equal(measure(signal_map(model), image.clone()), values)


def test_nets_of_half_precision_are_measured():
    model = timm.create_model("risotto_resnet20", seed=0, dtype=torch.bfloat16).eval()
    for measure, side in ((singular_values, 8), (probed_singular_values, 32)):
        image = torch.randn(3, side, side, generator=torch.Generator().manual_seed(0)).bfloat16()
        values = measure(signal_map(model), image)
        torch.testing.assert_close(values[:3].float(), torch.ones(3), atol=0.2, rtol=0)  # rounding, of 8 bits


# --- the seed


@pytest.mark.parametrize("name", ["risotto_resnet20", "risotto_resnet50_c", "risotto_resnet18_bn"])
def test_the_seed_fixes_the_weights(name):
    first, again, other = (timm.create_model(name, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    torch.manual_seed(9)
    drawn = timm.create_model(name).state_dict()
    torch.manual_seed(9)
    assert all(torch.equal(value, drawn[key]) for key, value in timm.create_model(name).state_dict().items())


@pytest.mark.gpu
def test_the_device_does_not_change_the_weights():
    on_gpu = timm.create_model("risotto_resnet50", seed=0, device="cuda").cpu().state_dict()
    for key, value in timm.create_model("risotto_resnet50", seed=0).state_dict().items():
        assert torch.equal(value, on_gpu[key])


def test_weights_do_not_depend_on_dtype_but_for_rounding():
    double, single = (timm.create_model("risotto_resnet20", seed=0, dtype=d) for d in (torch.float64, torch.float32))
    for key, value in single.state_dict().items():
        assert torch.equal(double.state_dict()[key].float(), value)


# --- other people's ResNets


def test_a_max_pool_is_let_through_and_is_no_isometry():
    model = risotto_(torchvision.models.resnet18(), generator=torch.Generator().manual_seed(0)).double().eval()
    values = singular_values(signal_map(model), torch.randn(3, 64, 64, dtype=torch.float64))
    assert values.max() > 2


def without_eps(model):
    """In evaluation mode fresh batch norm divides by sqrt(1 + eps); without eps it is the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    return model


def effective_spectrum(model, image):
    model.maxpool = nn.Identity()  # a max pool is no isometry
    values = singular_values(signal_map(without_eps(model).double().eval()), image)
    return values[values > 1e-8]


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_plain_resnets_of_timm_and_torchvision(library, depth):
    name = f"resnet{depth}"
    model = timm.create_model(name) if library == "timm" else getattr(torchvision.models, name)(weights=None)
    assert risotto_(model, generator=torch.Generator().manual_seed(0)) is model
    values = effective_spectrum(model, torch.randn(3, 16, 16, dtype=torch.float64))
    assert len(values) == 3
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-6, rtol=0)  # weights are float32
    last = model.layer1[0].bn2 if depth < 50 else model.layer1[0].bn3
    assert torch.equal(last.weight, torch.ones_like(last.weight)) and not last.bias.any()


def test_alpha_of_a_net_with_batch_norm_is_the_last_gamma():
    model = risotto_(timm.create_model("resnet18"), alpha=0.5)
    assert torch.equal(model.layer2[0].bn2.weight, torch.full((128,), 0.5))
    values = effective_spectrum(model, torch.randn(3, 16, 16, dtype=torch.float64))
    torch.testing.assert_close(values, torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"in_chans": 1},
        {"num_classes": 17},
        {"num_classes": 0},
        {"global_pool": "catavgmax"},
        {"output_stride": 8},
        {"stem_type": "deep", "stem_width": 32},
    ],
)
def test_options_of_timm_that_stay_exact(options):
    model = risotto_(timm.create_model("resnet18", **options))
    image = torch.randn(options.get("in_chans", 3), 16, 16, dtype=torch.float64)
    values = effective_spectrum(model, image)
    pixels = 16 if "output_stride" in options else 1  # the max pool let through
    ones = torch.ones(image.shape[0] * pixels, dtype=torch.float64)
    torch.testing.assert_close(values, ones, atol=1e-6, rtol=0)


def test_other_names_for_layers_and_a_relu_used_twice_change_nothing():
    model = timm.create_model("resnet18", stem_type="deep", stem_width=32)
    model.head, model.features = model.fc, nn.Sequential(model.conv1, model.layer1)
    model.conv1[5] = model.conv1[2]
    values = effective_spectrum(risotto_(model), torch.randn(3, 16, 16, dtype=torch.float64))
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-6, rtol=0)


of_the_batch = partial(nn.BatchNorm2d, track_running_stats=False)


def same_padding(model):
    model.conv1 = nn.Conv2d(3, 64, 7, padding="same")
    return model


def changed(name, change):
    model = timm.create_model(name)
    change(model)
    return model


@pytest.mark.parametrize(
    ("make", "named", "reason"),
    [
        (
            lambda: changed("resnet18", lambda m: prune.random_unstructured(m.layer1[0].conv1, "weight", 0.5)),
            "layer1.0.conv1",
            "is computed from others",
        ),
        (lambda: changed("resnet18", lambda m: parametrizations.spectral_norm(m.fc)), "fc", "is computed from others"),
        (
            lambda: changed("resnet18", lambda m: setattr(m.layer1[0], "conv1", m.layer1[1].conv1)),
            "layer1.0.conv1",
            "that of another layer, too",
        ),
        (
            lambda: changed("resnet18", lambda m: setattr(m.layer1[1].conv2, "weight", m.layer1[0].conv2.weight)),
            "layer1.1.conv2",
            "that of another layer, too",
        ),
        (lambda: changed("resnet18", lambda m: setattr(m, "act1", nn.Identity())), "conv1", "no ReLU follows"),
        (lambda: changed("resnet26d", lambda m: m.conv1.__setitem__(2, nn.Identity())), "conv1.0", "no ReLU follows"),
        (
            lambda: changed("resnet18", lambda m: setattr(m, "maxpool", nn.Conv2d(64, 64, 3, 2, 1))),
            "maxpool",
            "no ReLU follows",
        ),
        (
            lambda: changed("risotto_resnet20", lambda m: m.prune_intermediate_layers([0])),
            "ResNet",
            "no residual blocks",
        ),
        (lambda: timm.create_model("resnext50_32x4d"), "layer1.0.conv2", "grouped"),
        (lambda: timm.create_model("seresnet50"), "layer1.0.se", "attention"),
        (lambda: timm.create_model("resnetaa50"), "maxpool", "stem"),
        (lambda: timm.create_model("resnet50d"), "layer2.0.downsample", "averages"),
        (lambda: timm.create_model("resnet50_gn"), "bn1", "GroupNorm"),
        (lambda: timm.create_model("resnet18", act_layer="silu"), "act1", "SiLU"),
        (lambda: timm.create_model("resnet18", norm_layer=of_the_batch), "bn1", "without running statistics"),
        (lambda: same_padding(timm.create_model("resnet18")), "conv1", r"padding is 'same'; \(3, 3\) is needed"),
        (lambda: timm.create_model("resnet18", channels=(63, 128, 256, 512)), "layer1.0", "even"),
        (lambda: timm.create_model("resnet18", channels=(32, 64, 128, 256)), "layer1.0.downsample.0", "64 to 32"),
        (lambda: timm.create_model("resnet18", stem_type="deep", stem_width=64), "layer1.0.downsample.0", "128 to 64"),
        (lambda: timm.create_model("hrnet_w18_small"), "conv2", "outside stem, blocks and 'fc'"),
        (lambda: timm.create_model("mobilenetv3_small_050"), "MobileNetV3", "not a ResNet"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), "VisionTransformer", "not a ResNet"),
        (lambda: timm.create_model("resnetv2_50"), "ResNetV2", "not a ResNet"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential", "not a ResNet"),
    ],
)
def test_what_cannot_be_exact_is_refused_and_left_alone(make, named, reason):
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=reason) as error:
        risotto_(model)
    assert named in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("pools", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda **options: timm.create_model("risotto_resnet50_cifar", **options),
        lambda **options: timm.create_model("risotto_resnet20_bn", **options),
        lambda **options: timm.create_model("resnet50", **options),
    ],
)
def test_the_head_reads_the_signal_of_every_pool_by_a_semi_orthogonal_matrix(make, pools):
    model = risotto_(make(num_classes=6, global_pool="avg" if pools == 1 else "catavgmax"))
    parts = [part.chunk(2, dim=1) for part in model.fc.weight.detach().double().chunk(pools, dim=1)]
    for plus, minus in parts:
        assert torch.equal(minus, -plus)
    u = torch.cat([plus for plus, _ in parts], dim=1)
    torch.testing.assert_close(u @ u.T, torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0)
    assert not model.fc.bias.any()


def test_a_head_that_does_not_fit_the_pairs_is_refused_and_left_alone():
    model = torchvision.models.resnet18()
    model.fc = nn.Linear(500, 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="fc: 500 inputs are no multiple of 512"):
        risotto_(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for inputs in (96, 10):
        head = nn.Linear(inputs, 5)
        before = head.weight.clone()
        with pytest.raises(ValueError, match=f"{inputs} inputs are no multiple of 64"):
            risotto_head_(head, 64)
        assert torch.equal(head.weight, before)


def test_an_alpha_that_the_dtype_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"alpha=1e-05 .*float16 cannot hold"):
        timm.create_model("risotto_resnet20", dtype=torch.float16, alpha=1e-5)
    model = timm.create_model("risotto_resnet20", dtype=torch.float16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layer1\.0: torch\.float16 cannot hold alpha=100000"):
        risotto_(model, alpha=1e5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model = timm.create_model("risotto_resnet20", dtype=torch.float16, alpha=1e-4)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_what_fixup_leaves_in_its_scalars_is_zeroed_by_the_others():
    model = timm.create_model("risotto_resnet20", init="fixup", dtype=torch.float64).eval()
    for name, parameter in model.named_parameters():
        parameter.data.fill_(3.0) if name.endswith("biases") else None
    risotto_(model, generator=torch.Generator().manual_seed(0))
    assert_isometric(model, torch.randn(3, 16, 16, dtype=torch.float64), 1e-10)


def test_a_signal_that_fills_its_channels_may_narrow():
    options = {"stem": "cifar", "skip": "projection", "in_chans": 16, "num_classes": 2, "seed": 0}
    model = RisottoResNet(BasicBlock, (1, 1), (16, 8), dtype=torch.float64, **options)
    values = singular_values(signal_map(model.eval()), torch.randn(16, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(values[: 4 * 4], torch.ones(4 * 4, dtype=torch.float64), atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match=r"layer2\.0\.downsample\.0: from 16 to 8 channels"):
        RisottoResNet(BasicBlock, (1, 1), (16, 8), **{**options, "in_chans": 3})


@pytest.mark.parametrize("name", ["risotto_resnet56", "risotto_resnet50_cifar"])
def test_a_block_that_rotates_few_pairs_passes_all_others(name):
    model = timm.create_model(name, seed=0, rotated_pairs=2, dtype=torch.float64).eval()
    subsets, generator = set(), torch.Generator().manual_seed(4)
    for block in model.layer3[1:]:
        width = block.conv1.in_channels
        z = torch.randn(3, width // 2, 4, 4, dtype=torch.float64, generator=generator)
        x = torch.cat([z, -z], dim=1).relu()
        y = block(x)
        moved = ((y - x).abs().amax((0, 2, 3)) > 1e-9).nonzero().flatten().tolist()
        assert len({channel % (width // 2) for channel in moved}) == 2
        torch.testing.assert_close(y.norm(), x.norm())
        subsets.add(tuple(moved))
    assert len(subsets) > 1
    every = timm.create_model(name, seed=0).state_dict()
    for key, value in timm.create_model(name, seed=0, rotated_pairs=1000).state_dict().items():
        assert torch.equal(value, every[key]), key


def test_the_default_device_does_not_matter():
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    here = identity_basic_block(8, 1.0, seeds[0], rotated=1)
    with torch.device("meta"):
        elsewhere = identity_basic_block(8, 1.0, seeds[1], rotated=1)
    for a, b in zip(here, elsewhere, strict=True):
        assert torch.equal(a, b)


def test_impossible_alphas_and_generators_are_refused():
    model = timm.create_model("risotto_resnet20")
    before = model.state_dict()["conv1.weight"].clone()
    with pytest.raises(ValueError, match=r"layer1\.0: alpha=0 with an identity skip"):
        risotto_(model, alpha=0.0)
    with pytest.raises(ValueError, match="not a finite number"):
        risotto_(model, alpha=float("nan"))
    with pytest.raises(ValueError, match="alpha is 'x', not a finite number"):
        risotto_(model, alpha="x")
    with pytest.raises(ValueError, match=r"generator is 3, not a torch\.Generator"):
        risotto_(model, generator=3)
    for pairs in (0, -1, 0.5, True, "2"):
        with pytest.raises(ValueError, match="not a number of pairs"):
            risotto_(model, rotated_pairs=pairs)
    with pytest.raises(ValueError, match="neither an alpha"):
        risotto_(timm.create_model("resnet18", norm_layer=nn.Identity, zero_init_last=False), alpha=0.5)
    with pytest.raises(ValueError, match="neither an alpha"):
        he_(timm.create_model("resnet18", norm_layer=nn.Identity, zero_init_last=False), alpha=0.5)
    assert torch.equal(model.conv1.weight, before)
