import dataclasses
import time

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from latentgnn.blocks import blocks_of
from latentgnn.errors import UserError
from latentgnn.layer import LatentGNN
from latentgnn.tasks.detection.config import BlockConfig, ModelConfig
from latentgnn.tasks.detection.model import build_detector

CLASSES = 3
SMALL = ModelConfig(
    backbone="resnet18",
    norm="batch_norm",
    trainable_stages=5,
    fpn_channels=16,
    min_size=(64,),
    max_size=128,
    anchor_sizes=(8, 16, 32, 64, 128),
    rpn_pre_nms=(60, 50),
    rpn_post_nms=(40, 30),
    rpn_batch_size=32,
    box_batch_size=16,
    box_head_channels=24,
    mask_head_layers=2,
    mask_head_channels=12,
    score_threshold=0.0,
    nms_threshold=0.6,
    detections_per_image=10,
    image_mean=(0.4, 0.5, 0.6),
    image_std=(0.2, 0.3, 0.25),
)


def small(**changes) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes)


def build(**changes) -> nn.Module:
    torch.manual_seed(0)
    return build_detector(small(**changes), CLASSES)


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def targets(batch: list[Tensor]) -> list[dict[str, Tensor]]:
    made = []
    for index, image in enumerate(batch):
        masks = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        masks[:, 10:40, 8:44] = 1
        boxes, labels = torch.tensor([[8.0, 10.0, 44.0, 40.0]]), torch.tensor([1 + index % CLASSES])
        made.append({"boxes": boxes, "labels": labels, "masks": masks})
    return made


def torchvisions_own(config: ModelConfig) -> nn.Module:
    """The same detector from torchvision's parts alone."""
    retina = config.detector == "retinanet"
    width, layers = config.fpn_channels, ([2, 3, 4] if retina else [1, 2, 3, 4])
    backbone = BackboneWithFPN(
        torchvision.models.resnet18(weights=None),
        {f"layer{layer}": str(index) for index, layer in enumerate(layers)},
        [32 * 2**layer for layer in layers],
        width,
        extra_blocks=LastLevelP6P7(width, width) if retina else LastLevelMaxPool(),
    )
    sizes = {
        "min_size": 64,
        "max_size": 128,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    ratios = ((0.5, 1.0, 2.0),) * 5
    if retina:
        octaves = tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in config.anchor_sizes)
        return RetinaNet(
            backbone,
            CLASSES + 1,
            anchor_generator=AnchorGenerator(octaves, ratios),
            score_thresh=0.0,
            nms_thresh=0.6,
            detections_per_img=10,
            topk_candidates=50,
            **sizes,
        )
    options = {
        "rpn_anchor_generator": AnchorGenerator(tuple((s,) for s in config.anchor_sizes), ratios),
        "rpn_pre_nms_top_n_train": 60,
        "rpn_pre_nms_top_n_test": 50,
        "rpn_post_nms_top_n_train": 40,
        "rpn_post_nms_top_n_test": 30,
        "rpn_batch_size_per_image": 32,
        "box_head": TwoMLPHead(width * 49, 24),
        "box_predictor": FastRCNNPredictor(24, CLASSES + 1),
        "box_score_thresh": 0.0,
        "box_nms_thresh": 0.6,
        "box_detections_per_img": 10,
        "box_batch_size_per_image": 16,
    }
    if config.detector == "faster_rcnn":
        return FasterRCNN(backbone, **options, **sizes)
    heads = {
        "mask_head": MaskRCNNHeads(width, (12, 12), 1),
        "mask_predictor": MaskRCNNPredictor(12, 12, CLASSES + 1),
    }
    return MaskRCNN(backbone, **heads, **options, **sizes)


@pytest.mark.parametrize("detector", ["mask_rcnn", "faster_rcnn", "retinanet"])
def test_without_blocks_it_is_torchvisions_detector(detector):
    config = small(detector=detector)
    ours, theirs = build(detector=detector), torchvisions_own(config)
    theirs.load_state_dict(ours.state_dict())
    batch = images((64, 80), (96, 64), (70, 64))
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        losses.append(model.train()(batch, targets(batch)))
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name])
    # One by one, for torchvision's own results depend on the batch.
    with torch.no_grad():
        got, expected = ours.eval()(batch), [theirs.eval()([image])[0] for image in batch]
    for mine, reference in zip(got, expected, strict=True):
        assert len(mine["scores"]) > 0
        assert mine.keys() == reference.keys()
        for name, value in reference.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("detector", "backbone"),
    [
        (detector, backbone)
        for backbone in ("resnet18", "timm/resnet10t", "timm/convnext_atto", "mobilenet_v3_large")
        for detector in ("mask_rcnn", "faster_rcnn", "retinanet")
        # MobileNet has too few feature maps for a RetinaNet, which is refused.
        if (detector, backbone) != ("retinanet", "mobilenet_v3_large")
    ],
)
def test_an_images_result_does_not_depend_on_its_neighbours(detector, backbone):
    # MobileNet's channels have few divisors.
    block = BlockConfig(gamma_init=1.0, reduction=4 if backbone == "mobilenet_v3_large" else 8)
    blocks = {"C3": 4, "C5": (4, 2)}
    heads = "v1" if detector == "retinanet" or backbone.startswith("timm") else "v2"
    model = build(detector=detector, backbone=backbone, heads=heads, blocks=blocks, block=block).eval()
    batch = images((64, 72), (100, 128), (64, 72), (128, 64))
    with torch.no_grad():
        together = model(batch)
        for image, result in zip(batch, together, strict=True):
            (alone,) = model([image])
            assert len(alone["scores"]) > 0
            assert ("masks" in alone) == (detector == "mask_rcnn")
            for name, value in alone.items():
                torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-5)
        assert model([]) == []


def test_blocks_do_not_see_the_padding_in_training():
    """A block's input is the same twice on the image's own nodes, and arbitrary, also NaN, on the padding's."""
    model = build(blocks={"C3": 4, "C4": 4}, block=BlockConfig(gamma_init=1.0, norm="batch_norm")).train()
    body, batch = model.backbone.body, images((64, 128), (128, 64), (64, 64))
    tensors = model.transform(batch)[0].tensors
    assert tensors.shape == (3, 4, 128, 128)
    own = [(64, 128), (128, 64), (64, 64)]
    for mask, (height, width) in zip(tensors[:, 3], own, strict=True):
        assert mask[:height, :width].eq(1).all()
        assert mask.sum() == height * width
    block, fill = body.layer2.latentgnn, {}

    def disturb(module, args):
        x = args[0].clone()
        for image, (height, width) in zip(x, own, strict=True):
            image[:, height // 8 :], image[:, :, width // 8 :] = fill["value"], fill["value"]
        return (x,)

    seen = []
    body.layer2[1].register_forward_hook(lambda m, args, output: disturb(m, (output,))[0])
    block.register_forward_hook(lambda m, args, output: seen.append((args[0].detach(), output.detach())))
    for value in (0.0, 1e4, torch.nan):
        fill["value"] = value
        with torch.no_grad():
            model.backbone(tensors)
    for (height, width), *outputs in zip(own, *(out for _, out in seen), strict=True):
        valid = [output[:, : height // 8, : width // 8] for output in outputs]
        assert valid[0].isfinite().all()
        torch.testing.assert_close(valid[1], valid[0])
        torch.testing.assert_close(valid[2], valid[0])
    changes = (seen[0][1] - seen[0][0]).abs()
    assert changes[2, :, :8, :8].max() > 0.01  # the block does something
    assert changes[2, :, 8:].max() == 0


def test_training_step_reaches_every_trainable_parameter():
    model = build(blocks={"C2": 4, "C3": 4, "C4": 4, "C5": 4}, block=BlockConfig(gamma_init=0.5, norm="batch_norm"))
    batch = images((64, 80), (96, 64))
    losses = model.train()(batch, targets(batch))
    torch.stack(list(losses.values())).sum().backward()
    assert {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_names_and_gammas_of_blocks():
    model = build(blocks={"C4": 4, "C5": 4}, block=BlockConfig(gamma_init=0.25))
    gammas = {name: block.gamma.item() for name, block in blocks_of(model).items()}
    assert gammas == {"backbone.body.layer3.latentgnn": 0.25, "backbone.body.layer4.latentgnn": 0.25}
    assert blocks_of(build()) == {}


def test_block_settings():
    block = BlockConfig(
        reduction=4,
        symmetric=True,
        graph_conv=False,
        num_groups=2,
        norm="layer_norm",
        node_scale="mean",
        gamma_init=1.0,
    )
    made = build(blocks={"C3": (3, 5)}, block=block).backbone.body.layer2.latentgnn.config
    assert (made.channels, made.latents, made.reduction, made.symmetric) == (128, (3, 5), 4, True)
    assert (made.graph_conv, made.num_groups, made.node_scale, made.gamma_init) == (False, 2, "mean", 1.0)
    assert made.norm is nn.LayerNorm or made.norm == "layer_norm"


def test_blocks_leave_the_initialisation_of_the_rest_alone():
    plain, with_blocks = build().state_dict(), build(blocks={"C3": 4}).state_dict()
    assert all(torch.equal(with_blocks[name], value) for name, value in plain.items())


@pytest.mark.parametrize("trainable", range(6))
@pytest.mark.parametrize(
    ("backbone", "stages"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("timm/convnext_atto", ["stages_0", "stages_1", "stages_2", "stages_3"]),
    ],
)
def test_frozen_stages(backbone, stages, trainable):
    model = build(backbone=backbone, trainable_stages=trainable, blocks={"C2": 4})
    kept = stages[len(stages) - min(trainable, 4) :]
    for name, parameter in model.backbone.body.named_parameters():
        expected = "latentgnn" in name or trainable == 5 or any(name.startswith(f"{stage}.") for stage in kept)
        assert parameter.requires_grad == expected, name
    assert all(p.requires_grad for n, p in model.named_parameters() if not n.startswith("backbone.body"))


def test_what_comes_between_two_stages_belongs_to_the_second():
    model = build(backbone="timm/efficientnet_b0", trainable_stages=2)  # C4 is blocks.4, and blocks.3 leads to it
    learning = {n.split(".")[1] for n, p in model.backbone.body.named_parameters() if p.requires_grad and "blocks" in n}
    assert learning == {"3", "4", "5", "6"}


@pytest.mark.parametrize("backbone", ["resnet18", "timm/resnet10t", "timm/regnetx_002"])
def test_norms(backbone):
    kinds = {}
    for norm in ("batch_norm", "frozen_batch_norm", "group_norm"):
        body = build(backbone=backbone, norm=norm).backbone.body
        kinds[norm] = [m for m in body.modules() if "Norm" in type(m).__name__ and "Conv" not in type(m).__name__]
        names = {type(m).__name__ for m in kinds[norm]}
        assert len(names) <= 2
        assert all(
            name.startswith({"b": "BatchNorm", "f": "FrozenBatchNorm", "g": "GroupNorm"}[norm[0]]) for name in names
        )
        with torch.no_grad():
            assert all(f.isfinite().all() for f in model_maps(body))
    assert len({len(norms) for norms in kinds.values()}) == 1
    assert not [p for m in kinds["frozen_batch_norm"] for p in m.parameters()]


def model_maps(body: nn.Module) -> list[Tensor]:
    features = body(torch.randn(2, 3, 64, 64))
    return list(features.values()) if isinstance(features, dict) else features


def test_channels_last():
    model = build(blocks={"C4": 4}, block=BlockConfig(gamma_init=1.0)).eval()
    batch, seen = images((64, 80), (96, 64)), []
    model.backbone.body.layer1.register_forward_hook(lambda m, args, output: seen.append(output))
    with torch.no_grad():
        expected = model(batch)
        got = model.to(memory_format=torch.channels_last)(batch)
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in seen] == [False, False, True, True]
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine["boxes"], reference["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(mine["masks"], reference["masks"], rtol=1e-4, atol=1e-3)


def test_the_published_detector():
    """R-50 FPN with C345, by default: torchvision's names and sizes, and three blocks."""
    model = build_detector(ModelConfig(blocks={"C3": 150, "C4": 100, "C5": 50}), 80)
    published = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=81, norm_layer=FrozenBatchNorm2d
    )
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {n: s for n, s in shapes.items() if "latentgnn" not in n and "num_batches" not in n} == {
        name: value.shape for name, value in published.state_dict().items() if "num_batches" not in name
    }
    latents = [m.config.latents for m in model.modules() if isinstance(m, LatentGNN)]
    assert latents == [(150,), (100,), (50,)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": "resnet5"}, "nearest: .*resnet50.*timm/<name>"),
        ({"backbone": "timm/resnet5"}, "nearest: .*timm/resnet50"),
        ({"backbone": "timm/vit_tiny_patch16_224"}, "strides 4, 8, 16 and 32"),
        ({"backbone": "timm/swin_tiny_patch4_window7_224"}, "no feature maps"),
        ({"detector": "yolo"}, "detector: expected one of"),
        ({"norm": "layer_norm"}, "norm: expected one of"),
        ({"blocks": {"C6": 3}}, "stages among C2, C3, C4, C5 with 1 to 16,384 latents"),
        ({"blocks": {"C4": 0}}, "blocks: expected .* 1 to 16,384 latents a kernel; got"),
        ({"blocks": {"C4": 10**9}}, "1 to 16,384 latents"),
        ({"blocks": {"C4": ()}}, "1 to 16,384 latents"),
        ({"detections_per_image": 10**9}, "detections_per_image: expected 1 to 10,000"),
        ({"blocks": {"C4": 4}, "block": BlockConfig(reduction=7)}, "model.blocks.*divisible"),
        ({"anchor_sizes": (8, 16, 32, 64)}, "anchor_sizes: expected five"),
        ({"anchor_ratios": ()}, "anchor_ratios"),
        ({"trainable_stages": 6}, "trainable_stages"),
        ({"min_size": ()}, "min_size"),
        ({"image_std": (0.0, 1.0, 1.0)}, "image_std"),
        ({"mask_head_layers": 0}, "mask_head_layers"),
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"weights_backbone": "IMAGENET1K_V9"}, "no file and none of .*IMAGENET1K_V1.*null"),
        ({"backbone": "timm/resnet10t", "weights_backbone": "IMAGENET1K_V1"}, "no file and none of .*'pretrained'"),
        ({"norm": "group_norm", "weights_backbone": "IMAGENET1K_V1"}, "trained with batch norm"),
        ({"stride_in_1x1": True}, "'resnet18' has no 1x1 convolution"),
        ({"stride_in_1x1": True, "backbone": "timm/resnet10t"}, "for torchvision's ResNets"),
        ({"backbone": "mobilenet_v3_large", "detector": "retinanet"}, "a RetinaNet needs three; take timm/"),
        ({"heads": "v2", "detector": "retinanet"}, "multiples of 32; got 16"),
        ({"heads": "v3"}, "heads: expected one of v1, v2"),
        ({"norm_eps": -1.0}, "norm_eps: expected 0 or more"),
        ({"backbone": "mobilenet_v3"}, "nearest: mobilenet_v3_large"),
    ],
)
def test_refuses(changes, words):
    with pytest.raises(UserError, match=words):
        build(**changes)


def test_refuses_no_category():
    with pytest.raises(UserError, match="at least one category"):
        build_detector(SMALL, 0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("backbone", "whole", "norm"),
    [
        ("resnet18", lambda: torchvision.models.resnet18(weights=None, num_classes=7), "frozen_batch_norm"),
        ("resnet18", lambda: torchvision.models.resnet18(weights=None), "batch_norm"),
        ("mobilenet_v3_large", lambda: torchvision.models.mobilenet_v3_large(weights=None), "frozen_batch_norm"),
        ("timm/resnet10t", lambda: timm.create_model("resnet10t"), "frozen_batch_norm"),
        ("timm/convnext_atto", lambda: timm.create_model("convnext_atto"), "frozen_batch_norm"),
    ],
)
def test_weights_of_a_whole_network_load_from_a_file(tmp_path, suffix, backbone, whole, norm):
    torch.manual_seed(5)
    source = whole().eval()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path / f"weights{suffix}"
    state = {name: value.contiguous() for name, value in source.state_dict().items()}
    if suffix == ".pth":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        safetensors.torch.save_file(state, path)
    changes = {"detector": "faster_rcnn", "norm_eps": 1e-3} if backbone == "mobilenet_v3_large" else {}
    model = build(backbone=backbone, norm=norm, weights_backbone=str(path), blocks={"C3": 4}, **changes).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        if backbone == "resnet18":
            expected = source.layer4(
                source.layer3(
                    source.layer2(source.layer1(source.maxpool(source.relu(source.bn1(source.conv1(image))))))
                )
            )
        elif backbone == "mobilenet_v3_large":
            expected = source.features(image)
        else:
            expected = source.forward_intermediates(image, intermediates_only=True)[-1]
        got = model.backbone.body(image)
    torch.testing.assert_close(list(got.values())[-1] if isinstance(got, dict) else got[-1], expected)


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    path = tmp_path / "weights.pth"
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    state["extra.weight"] = state.pop("layer2.0.bn1.bias")
    torch.save(state, path)
    with pytest.raises(UserError) as caught:
        build(weights_backbone=str(path))
    for words in (
        "layer2.0.bn1.bias is missing",
        "extra.weight is unexpected",
        "layer1.0.conv1.weight has shape (64, 64, 1, 1), expected (64, 64, 3, 3)",
    ):
        assert words in str(caught.value)
    path.write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot read"):
        build(weights_backbone=str(path))
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="no state dict"):
        build(weights_backbone=str(path))


def test_without_a_network_downloads_fail_soon_and_clearly(tmp_path, monkeypatch):
    nowhere = "http://127.0.0.1:9"  # nothing listens on the discard port
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, nowhere)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for backbone, weights in (("resnet18", "IMAGENET1K_V1"), ("timm/resnet10t", "pretrained")):
        start = time.monotonic()
        with pytest.raises(UserError, match=r"--model.weights_backbone null") as caught:
            build(backbone=backbone, weights_backbone=weights)
        assert time.monotonic() - start < 15
        assert backbone in str(caught.value)
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
