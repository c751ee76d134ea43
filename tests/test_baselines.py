"""The schemes that RISOTTO competes with, each by its defining property."""

import math

import pytest
import timm
import torch
import torchvision

from risotto_zoo.initializers import SCHEMES, fixup_, he_, orthogonal_delta_, rezero_, skipinit_
from risotto_zoo.initializers.structure import resnet_structure


def make(name, init, **kwargs):
    return timm.create_model(name, init=init, seed=0, dtype=torch.float64, **kwargs).eval()


def images(size=16):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def shortcut(block, x):
    return torch.relu(x if block.downsample is None else block.downsample(x))


def scrambled(model):
    """Other weights in every branch but the last layer's."""
    for block in resnet_structure(model).blocks:
        for conv in block.convs[:-1]:
            torch.nn.init.normal_(conv.weight)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["risotto_resnet20", "risotto_resnet20_c", "risotto_resnet50_cifar"])
def test_fixup_starts_as_if_it_had_no_branches(name):
    model = make(name, "fixup")
    before = model.forward_features(images())
    assert torch.equal(scrambled(model).forward_features(images()), before)
    assert not model(images()).any()  # the classifier is zero
    x = model.maxpool(model.act1(model.conv1(images())))
    for block in [block for i in range(1, 5) for block in getattr(model, f"layer{i}")]:
        assert torch.equal(block(x), shortcut(block, x))
        x = shortcut(block, x)


@pytest.mark.parametrize(("name", "layers", "blocks"), [("risotto_resnet56", 2, 27), ("risotto_resnet50", 3, 16)])
def test_fixup_scales_the_inner_layers_with_depth(name, layers, blocks):
    model = timm.create_model(name, init="fixup", seed=0)
    conv = model.layer3[1].conv2 if layers == 3 else model.layer3[1].conv1
    expected = 2 / (conv.out_channels * 9) * blocks ** (-1 / (layers - 1))
    assert conv.weight.var().item() == pytest.approx(expected, rel=0.05)
    for block in resnet_structure(model).blocks:
        assert block.gain.item() == 1 and len(block.biases) == 2 * layers and not block.biases.any()
        assert all(conv.bias is None for conv in block.convs)


def test_the_scalar_biases_of_fixup_stand_where_the_paper_puts_them():
    block = make("risotto_resnet20", "fixup").layer1[1]
    torch.nn.init.normal_(block.conv2.weight)
    torch.nn.init.normal_(block.biases)
    torch.nn.init.constant_(block.alpha, 0.7)
    x, b = torch.rand(2, 16, 6, 6, dtype=torch.float64), block.biases
    inner = torch.relu(block.conv1(x + b[0]) + b[1])
    expected = torch.relu(block.conv2(inner + b[2]) * 0.7 + b[3] + x)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-14)


def test_the_scalar_biases_of_fixup_stand_there_in_a_bottleneck_too():
    block = make("risotto_resnet50_cifar", "fixup").layer1[1]
    torch.nn.init.normal_(block.conv3.weight)
    torch.nn.init.normal_(block.biases)
    torch.nn.init.constant_(block.alpha, 0.7)
    x, b = torch.rand(2, 256, 4, 4, dtype=torch.float64), block.biases
    inner = torch.relu(block.conv2(torch.relu(block.conv1(x + b[0]) + b[1]) + b[2]) + b[3])
    expected = torch.relu(block.conv3(inner + b[4]) * 0.7 + b[5] + x)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-13)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["skipinit", "rezero"])
@pytest.mark.parametrize("name", ["risotto_resnet20", "risotto_resnet20_c", "risotto_resnet18_cifar_bn"])
def test_skipinit_and_rezero_start_with_every_block_its_skip(scheme, name):
    model = make(name, scheme)
    x = model.maxpool(model.act1(model.bn1(model.conv1(images()))))
    for block in [block for i in range(1, 5) for block in getattr(model, f"layer{i}")]:
        expected = shortcut(block, x)
        x = block(x)
        assert torch.equal(x, expected)
        assert block.conv2.weight.any()


def test_skipinit_learns_its_multipliers_first():
    model = make("risotto_resnet20", "skipinit")
    model(images()).square().sum().backward()
    assert model.layer2[1].alpha.grad != 0 and not model.layer2[1].conv1.weight.grad.any()


def test_he_and_rezero_have_their_variances():
    he = he_(timm.create_model("risotto_resnet18"), generator=torch.Generator().manual_seed(0))
    rezero = rezero_(timm.create_model("risotto_resnet18"), generator=torch.Generator().manual_seed(0))
    for net, kernel, head in ((he, 2 / (256 * 9), 1 / 512), (rezero, 1 / (3 * 256 * 9), 1 / (3 * 512))):
        assert net.layer3[1].conv1.weight.var().item() == pytest.approx(kernel, rel=0.02)
        assert not net.layer3[1].conv1.bias.any()
        assert net.fc.weight.var().item() == pytest.approx(head, rel=0.02) and not net.fc.bias.any()
    assert rezero.layer3[1].conv1.weight.abs().max() <= (256 * 9) ** -0.5


def test_delta_orthogonal_kernels_are_orthogonal_and_delta():
    model = make("risotto_resnet20_c", "orthogonal_delta")
    for block in resnet_structure(model).blocks:
        for conv, gain in [*((conv, 2.0) for conv in block.convs[:-1]), (block.convs[-1], 1.0), (block.skip, 1.0)]:
            matrix = conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2]
            torch.testing.assert_close(
                matrix.T @ matrix, gain * torch.eye(conv.in_channels, dtype=torch.float64), rtol=0, atol=1e-12
            )
            assert conv.weight.count_nonzero() <= matrix.numel()
    head = model.fc.weight
    torch.testing.assert_close(head @ head.T, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12)
    # no pairs: this is not RISOTTO's structure
    centre = model.layer1[1].conv1.weight[:, :, 1, 1]
    assert not torch.allclose(centre[:8, :8], centre[8:, 8:])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_deterministic_and_works_in_place_on_plain_nets(scheme):
    function = SCHEMES[scheme]
    normalized = scheme != "fixup"
    plain = torchvision.models.resnet18() if normalized else timm.create_model("risotto_resnet18")
    first, second = (
        {k: v.clone() for k, v in function(plain, None, torch.Generator().manual_seed(3)).state_dict().items()}
        for _ in range(2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    again = timm.create_model("risotto_resnet20", init=scheme, seed=5)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.fill_(7)
    again.init_weights()
    fresh = timm.create_model("risotto_resnet20", init=scheme, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_takes_a_training_step(scheme):
    model = timm.create_model("risotto_resnet20", init=scheme, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):  # from zero classifiers and branches the rest moves from the second step on
        loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert math.isfinite(loss.item())
    assert any(p.grad.any() for p in model.layer2.parameters())


def test_what_is_not_defined_is_refused():
    with pytest.raises(ValueError, match="without normalization"):
        timm.create_model("risotto_resnet20_bn", init="fixup")
    with pytest.raises(ValueError, match="without normalization"):
        fixup_(torchvision.models.resnet18())
    for scheme in (skipinit_, rezero_):
        with pytest.raises(ValueError, match="alpha = 0, not 1"):
            scheme(timm.create_model("risotto_resnet20"), alpha=1.0)
    assert orthogonal_delta_(timm.create_model("risotto_resnet20"), alpha=0.5).layer1[0].alpha == 0.5
