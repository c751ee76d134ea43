"""With patches, strided layers read every pixel and every non-zero singular value is 1 all the same."""

import pytest
import timm
import torch
import torchvision
from test_risotto import DEEPEST_SLOW, without_eps
from torch import nn

from risotto_zoo.initializers import risotto_
from risotto_zoo.initializers.matrices import semi_orthogonal
from risotto_zoo.initializers.patches import isometric_on
from risotto_zoo.isometry import probed_singular_values, signal, signal_by_block, signal_map, singular_values
from risotto_zoo.models import BasicBlock, Bottleneck, RisottoResNet


def assert_isometric(model, image, rank, tolerance):
    values = singular_values(signal_map(model.eval()), image)
    torch.testing.assert_close(values[:rank], torch.ones(rank, dtype=values.dtype), atol=tolerance, rtol=0)
    assert (values[rank:] <= tolerance).all()


@pytest.mark.parametrize("name", DEEPEST_SLOW)
def test_every_model_with_patches_is_isometric_from_more_than_a_sample_of_the_pixels(name):
    """The rank is what the channels have room for: without patches it is 3 for a pixel of the last map."""
    model = timm.create_model(name, seed=0, dtype=torch.float64, patches=True, alpha=0.1, rotated_pairs=1).eval()
    size = model.feature_info[-1]["reduction"]
    image = torch.randn(3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, image = model.to(dtype), image.to(dtype)
        if model.num_features == 64:
            assert_isometric(model, image, 32, tolerance)
        elif name == "risotto_resnet18_cifar":
            assert_isometric(model, image, 3 * 8 * 8, tolerance)  # all pixels
        elif name == "risotto_resnet18":
            assert_isometric(model, image, 256, tolerance)  # all pairs of the last map
        else:  # more values than can be had in seconds
            values = probed_singular_values(signal_map(model), image, 3)
            torch.testing.assert_close(values, torch.ones(3, dtype=dtype), atol=tolerance, rtol=0)


@pytest.mark.slow
def test_bottlenecks_keep_as_many_dimensions_as_the_readme_says():
    model = timm.create_model("risotto_resnet50", seed=0, dtype=torch.float64, patches=True)
    image = torch.randn(3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_isometric(model, image, 480, 1e-10)


def test_patches_lose_nothing_of_an_image_where_there_is_room():
    model = timm.create_model("risotto_resnet18_cifar", seed=0, dtype=torch.float64, patches=True).eval()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    signals = signal_map(model)(images)
    torch.testing.assert_close(signals.norm(dim=1), images.flatten(1).norm(dim=1), rtol=1e-10, atol=0)
    torch.testing.assert_close(signals @ signals.T, images.flatten(1) @ images.flatten(1).T, rtol=1e-8, atol=1e-8)
    sampled = timm.create_model("risotto_resnet18_cifar", seed=0, dtype=torch.float64).eval()
    assert (signal_map(sampled)(images).norm(dim=1) < 0.2 * images.flatten(1).norm(dim=1)).all()
    blocks = signal_by_block(model, images, whole_maps=True)
    for block in blocks:
        assert block.norm == pytest.approx(images.square().sum(dim=(1, 2, 3)).mean().sqrt().item(), rel=1e-10)
        assert block.similarity == pytest.approx(blocks[0].similarity, abs=1e-10)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("skip", ["identity", "projection"])
@pytest.mark.parametrize(
    "options", [{"in_chans": 1}, {"in_chans": 12}, {"alpha": 0.5}, {"alpha": -2.0}, {"rotated_pairs": 9}]
)
def test_odd_cases_with_patches_are_isometric(block, skip, options):
    options = {"in_chans": 3, "num_classes": 2, "seed": 0, **options}
    model = RisottoResNet(
        block, (2, 2, 2), (8, 16, 32), stem="cifar", skip=skip, patches=True, dtype=torch.float64, **options
    )
    image = torch.randn(options["in_chans"], 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # Of 4 x 4 pixels: all their numbers, or the pairs of the last map, or what the bottlenecks let through. Of 12
    # channels that is 4, 12 and 28 dimensions, which are the stem's pairs, then one pixel's and 8 more, then 16 more.
    room = {1: 16, 3: 16 if block is BasicBlock else 27, 12: 16 if block is BasicBlock else 28}
    assert_isometric(model, image, 2 * room[options["in_chans"]], 1e-10)


def test_many_blocks_with_patches_are_isometric():
    for skip in ("identity", "projection"):
        model = RisottoResNet(
            BasicBlock, (250, 250), (8, 16), stem="cifar", skip=skip, num_classes=2, seed=0, dtype=torch.float64,
            patches=True,
        )  # fmt: skip
        image = torch.randn(3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        assert_isometric(model, image, 8, 1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"output_stride": 2},  # dilated where it does not stride
        {"channels": (8, 16, 6), "skip": "projection"},  # narrower than what a patch holds
        {"channels": (8, 16, 6), "skip": "projection", "alpha": 0.0},
    ],
)
def test_patches_of_unusual_shapes_are_isometric(options):
    options = {"channels": (8, 16, 32), "num_classes": 2, "seed": 0, **options}
    model = RisottoResNet(BasicBlock, (2, 2, 2), stem="cifar", patches=True, dtype=torch.float64, **options)
    image = torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rank = 16 * 8 if "output_stride" in options else 4 * 3
    assert_isometric(model, image, rank, 1e-10)


@pytest.mark.parametrize("stride", [(2, 1), (1, 2)])
def test_patches_need_not_be_square_and_biases_are_zeroed(stride):
    model = RisottoResNet(BasicBlock, (1, 1), (8, 16), stem="cifar", num_classes=2, dtype=torch.float64)
    for conv in (model.layer2[0].conv1, model.layer2[0].downsample[0]):
        conv.stride = stride
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and conv.bias is not None:
            conv.bias.data.fill_(1.0)
    risotto_(model, generator=torch.Generator().manual_seed(0), patches=True)
    image = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_isometric(model, image, 3 * 16, 1e-10)
    assert not any(conv.bias.any() for conv in model.modules() if isinstance(conv, nn.Conv2d) and conv.bias is not None)


def test_a_matrix_is_semi_orthogonal_and_isometric_on_its_subspace():
    generator = torch.Generator().manual_seed(0)
    span = semi_orthogonal(12, 3, generator)
    for outputs in (2, 3, 8, 12, 20):
        matrix, image = isometric_on(span, outputs, generator)
        gram = matrix @ matrix.T if outputs <= 12 else matrix.T @ matrix
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-12, rtol=0)
        assert image.shape == (outputs, min(3, outputs))
        if outputs < 3:
            torch.testing.assert_close(matrix @ span @ span.T, matrix, atol=1e-12, rtol=0)
        else:
            torch.testing.assert_close(matrix @ span, image, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("resnet18"),
        lambda: timm.create_model("risotto_resnet18_bn"),
        lambda: torchvision.models.resnet50(weights=None),
    ],
)
def test_patches_of_plain_resnets_are_isometric_without_their_pool_and_behind_it(make):
    seed = torch.Generator()
    behind = risotto_(without_eps(make()), generator=seed.manual_seed(0), patches=True).double().eval()
    stages = nn.Sequential(behind.layer1, behind.layer2, behind.layer3, behind.layer4)
    z = torch.randn(32, 8, 8, dtype=torch.float64, generator=seed.manual_seed(1))
    pairs = lambda z: torch.cat([z, -z], dim=1).relu()  # noqa: E731
    values = probed_singular_values(lambda z: signal(stages(pairs(z))).flatten(1), z, 16)
    torch.testing.assert_close(values, torch.ones(16, dtype=torch.float64), atol=1e-5, rtol=0)

    model = without_eps(make())
    model.maxpool = nn.Identity()
    risotto_(model, generator=seed.manual_seed(0), patches=True)
    image = torch.randn(3, 16, 16, dtype=torch.float64, generator=seed.manual_seed(1))
    values = probed_singular_values(signal_map(model.double().eval()), image, 16)
    torch.testing.assert_close(values, torch.ones(16, dtype=torch.float64), atol=1e-5, rtol=0)


def _replace(parent, name, **changes):
    old = getattr(parent, name)
    keys = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    setattr(parent, name, nn.Conv2d(**{**{key: getattr(old, key) for key in keys}, **changes}))


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        (lambda net: net, {"conv1": {"kernel_size": 1, "padding": 0}}, "layer 1 of the stem: .* a 1x1 kernel"),
        (lambda net: net.layer2[0], {"conv1": {"kernel_size": 2}}, "layer2.0.conv1: .* a 2x2 kernel"),
        (lambda net: net.layer2[0], {"conv1": {"dilation": 2, "padding": 2}}, "layer2.0.conv1: .* strided and dilated"),
        (
            lambda net: net.layer2[0],
            {"conv1": {"kernel_size": (3, 1), "padding": (1, 0)}},
            "layer2.0.conv1: patches do not fit: a 3x1 kernel does not cover the 2x2",
        ),
        (
            lambda net: net.layer2[0],
            {"conv1": {"stride": (2, 1)}, "conv2": {"stride": (1, 2)}},
            "layer2.0: patches need the stride of a block in one",
        ),
    ],
)
def test_patches_that_no_kernel_covers_are_refused(part, changes, reason):
    model = timm.create_model("resnet18")
    for name, change in changes.items():
        _replace(part(model), name, **change)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=reason):
        risotto_(model, patches=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_impossible_patches_are_refused():
    for patches in (1, "no", None):
        with pytest.raises(ValueError, match="not True or False"):
            risotto_(timm.create_model("risotto_resnet20"), patches=patches)
    with pytest.raises(ValueError, match=r"layer2\.0: alpha=1e-06 .*float16 cannot hold"):
        timm.create_model("risotto_resnet20_c", dtype=torch.float16, alpha=1e-6, patches=True)
    timm.create_model("risotto_resnet20_c", dtype=torch.float16, alpha=1e-6)
