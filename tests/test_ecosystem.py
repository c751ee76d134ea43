"""At home in timm, torchvision and transformers: what the README promises of other people's tools."""

import json
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from risotto_zoo.hub import MANIFEST
from training.cards import CARDS

PHOTO = load_sample_images().images[0]


class Pyramid(nn.Module):
    """A features_only net under torchvision's feature pyramid, as its detectors want a backbone."""

    out_channels = 64

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
        self.neck = torchvision.ops.FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, images):
        return self.neck(OrderedDict((str(i), each) for i, each in enumerate(self.body(images))))


def test_a_detector_learns_on_a_backbone_of_the_zoo():
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((1.0,),) * 4)
    pooler = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    torch.manual_seed(0)
    detector = FasterRCNN(
        Pyramid("risotto_resnet18"),
        num_classes=2,
        rpn_anchor_generator=anchors,
        box_roi_pool=pooler,
        min_size=96,
        max_size=128,
    ).train()
    image = torch.from_numpy(PHOTO.copy()).permute(2, 0, 1).float() / 255
    target = {"boxes": torch.tensor([[100.0, 80.0, 400.0, 300.0]]), "labels": torch.tensor([1])}
    losses = detector([image], [target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert detector.backbone.body.conv1.weight.grad.abs().sum() > 0
    with torch.no_grad():
        (found,) = detector.eval()([image])
    assert found["boxes"].shape[1] == 4


def test_the_preparation_of_images_is_that_of_the_training():
    model = timm.create_model("risotto_resnet20", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32) and config["mean"] == model.pretrained_cfg["mean"]
    image = timm.data.create_transform(**config)(Image.fromarray(PHOTO))
    assert image.shape == (3, 32, 32)


@pytest.mark.parametrize("name", [name for name in MANIFEST if MANIFEST[name]["location"] != "hub"])
def test_transformers_reads_a_release(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install transformers")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(CARDS / name).float().eval()
    processor = transformers.AutoImageProcessor.from_pretrained(CARDS / name)
    pixels = processor(Image.fromarray(PHOTO), return_tensors="pt")["pixel_values"]
    ours = timm.create_model(name, pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels).logits, ours(pixels), rtol=1e-5, atol=1e-5)
    labels = json.loads((CARDS / name / "config.json").read_text())["label_names"]
    assert len(theirs.config.id2label) == len(labels)


def test_weights_of_a_net_with_batch_norm_live_in_plain_timm():
    plain = timm.create_model("resnet18", num_classes=10)
    plain.load_state_dict(timm.create_model("risotto_resnet18_bn", num_classes=10).state_dict())
