"""The published AlignPS in plain PyTorch: the oracle of the parity tests.

Written from the facts about the published implementation, with torchvision's operators; nothing is
shared with the JAX code. `state_dict()` has the released names and shapes.
Training follows the released code literally, with loops where it loops: slow and easy to check.
Maps are NCHW, boxes x1, y1, x2, y2 in pixels.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import DeformConv2d, nms

from tests.oracle.random_weights import random_state_dict

STRIDES = (8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What differs between the released models, and widths for small copies of them."""

    deform_stages: tuple[int, ...] = ()
    lut_size: int = 5532
    queue_size: int = 5000
    lut_temperature: float = 10.0
    normalize_lut: bool = False
    triplet: bool = True
    width: int = 64
    channels: int = 256
    groups: int = 32


def spec_of(name: str, **changes) -> Spec:
    """A released model: "cuhk", "cuhk_plus", "prw" or "prw_plus"."""
    dataset, _, plus = name.partition("_")
    prw = {"lut_size": 483, "queue_size": 500, "lut_temperature": 15.0}
    prw |= {"normalize_lut": True, "triplet": False}
    deform = {"deform_stages": (3, 4, 5)} if plus else {}
    return Spec(**{**deform, **(prw if dataset == "prw" else {}), **changes})


class DeformConv(DeformConv2d):
    """DCNv1, or DCNv2 with `modulated`: 27 predicted channels, of which the last 9 are the mask."""

    def __init__(self, inputs: int, outputs: int, *, modulated: bool, bias: bool):
        super().__init__(inputs, outputs, 3, padding=1, bias=bias)
        self.conv_offset = nn.Conv2d(inputs, 27 if modulated else 18, 3, padding=1)
        self.modulated = modulated

    def forward(self, x: Tensor) -> Tensor:
        predicted = self.conv_offset(x)
        mask = predicted[:, 18:].sigmoid() if self.modulated else None
        return super().forward(x, predicted[:, :18], mask)


class ResNet50(ResNet):
    """torchvision's in Caffe's style: the first convolution of a stage has the stride.

    Statistics and affine of all norms, the stem and the first stage are frozen.
    """

    def __init__(self, width: int, deform_stages: tuple[int, ...]):
        self.width = width
        super().__init__(Bottleneck, [3, 4, 6, 3])
        del self.fc
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for block in (block for stage in deform_stages for block in self.stages()[stage - 2]):
            inner = block.conv2.in_channels
            block.conv2 = DeformConv(inner, inner, modulated=True, bias=False)
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in (self.conv1, self.layer1, *norms):
            module.requires_grad_(False)
        self.eval()

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False) -> nn.Sequential:
        planes = planes * self.width // 64
        if stride == 1:
            self.inplanes = planes  # what the stem gives
        stage = super()._make_layer(block, planes, blocks, stride)
        stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, (1, 1)
        return stage

    def stages(self) -> tuple[nn.Sequential, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def train(self, mode: bool = True) -> ResNet50:
        return super().train(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.maxpool(self.relu(self.bn1(self.conv1(x))))]
        for stage in self.stages():
            maps.append(stage(maps[-1]))
        return maps[1:]


class PlainConv(nn.Module):
    """A convolution under the name `conv`, with group norm and ReLU if `groups` is given."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int | None = None):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
        if groups:
            self.gn = nn.GroupNorm(groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return functional.relu(self.gn(x)) if hasattr(self, "gn") else x


class Neck(nn.Module):
    def __init__(self, inputs: tuple[int, int, int], channels: int):
        super().__init__()

        def deform(count: int) -> DeformConv:
            return DeformConv(count, channels, modulated=False, bias=False)

        self.lateral_convs = nn.ModuleList([deform(count) for count in inputs])
        self.fpn_convs = nn.ModuleList(
            [deform(factor * channels) for factor in (3, 2, 1)]
            + [PlainConv(channels, channels, stride=2) for _ in range(2)]
        )

    def forward(self, maps: list[Tensor], train: bool) -> tuple[list[Tensor], list[Tensor]]:
        """(P3,) or (P3, ..., P7), and the laterals."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        top4 = torch.cat(
            [laterals[1], functional.interpolate(laterals[2], laterals[1].shape[2:])], 1
        )
        top3 = torch.cat([laterals[0], functional.interpolate(top4, laterals[0].shape[2:])], 1)
        p3 = self.fpn_convs[0](top3)
        levels = [p3 - p3.mean((2, 3), keepdim=True)]
        if train:
            levels += [self.fpn_convs[1](top4), self.fpn_convs[2](laterals[2])]
            levels.append(self.fpn_convs[3](levels[2]))
            levels.append(self.fpn_convs[4](functional.relu(levels[3])))
        return levels, laterals


def buffers(**tensors: Tensor) -> nn.Module:
    """A module of buffers only."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


class Head(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        channels, groups = spec.channels, spec.groups

        def tower() -> nn.ModuleList:
            convs = [PlainConv(channels, channels, groups=groups) for _ in range(4)]
            convs[3].conv = DeformConv(channels, channels, modulated=True, bias=True)
            return nn.ModuleList(convs)

        self.cls_convs, self.reg_convs = tower(), tower()
        self.conv_cls = nn.Conv2d(channels, 1, 3, 1, 1)
        self.conv_reg = nn.Conv2d(channels, 4, 3, 1, 1)
        self.conv_centerness = nn.Conv2d(channels, 1, 3, 1, 1)
        self.scales = nn.ModuleList(nn.ParameterDict({"scale": torch.ones(())}) for _ in STRIDES)
        self.labeled_matching_layer = buffers(lookup_table=torch.zeros(spec.lut_size, channels))
        self.unlabeled_matching_layer = buffers(
            queue=torch.zeros(spec.queue_size, channels), tail=torch.tensor(0)
        )

    def forward(self, x: Tensor, level: int) -> dict[str, Tensor]:
        cls = box = x
        for conv in self.cls_convs:
            cls = conv(cls)
        for conv in self.reg_convs:
            box = conv(box)
        return {
            "cls": self.conv_cls(cls),
            "box": functional.relu(self.scales[level]["scale"] * self.conv_reg(box)),
            "centerness": self.conv_centerness(box),
            "embeddings": x,
        }


class AlignPS(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.backbone = ResNet50(spec.width, spec.deform_stages)
        self.neck = Neck(tuple(spec.width * factor for factor in (8, 16, 32)), spec.channels)
        self.bbox_head = Head(spec)

    def forward(self, pixels: Tensor, train: bool = False) -> tuple[list, dict[str, Tensor]]:
        """Outputs of every level, and the stages by name, for normalized pixels [B, 3, H, W]."""
        maps = self.backbone(pixels)
        levels, laterals = self.neck(maps[1:], train)
        outputs = [self.bbox_head(x, level) for level, x in enumerate(levels)]
        stages = {f"C{index}": x for index, x in enumerate(maps, start=2)}
        stages |= {f"lateral{index}": x for index, x in enumerate(laterals, start=3)}
        return outputs, stages | {"P3": levels[0]}


def random_model(spec: Spec, gentle: bool) -> AlignPS:
    """A model with random weights."""
    model = AlignPS(spec)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = random_state_dict(shapes, 1, gentle)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    return model


def locations(height: int, width: int, stride: int) -> Tensor:
    """[height * width, 2], x and y of the cells' centers, row by row."""
    y = torch.arange(height).repeat_interleave(width)
    x = torch.arange(width).repeat(height)
    return torch.stack([x, y], 1) * stride + stride // 2


def rows(x: Tensor) -> Tensor:
    """[C, h, w] as [h * w, C]."""
    return x.permute(1, 2, 0).flatten(0, 1)


def detect(
    output: dict[str, Tensor], size: tuple[int, int], scale: tuple[float, float]
) -> dict[str, Tensor]:
    """The detections of the one image of a batch, boxes in the photo's pixels, best first.

    `size` is the unpadded height and width, `scale` the factors (x, y) of the resize.
    """
    cls, box, centerness, embeddings = (
        rows(output[key][0]) for key in ("cls", "box", "centerness", "embeddings")
    )
    points = locations(*output["cls"].shape[2:], STRIDES[0]).to(box)
    cls, centerness = cls[:, 0].sigmoid(), centerness[:, 0].sigmoid()
    best = (cls * centerness).topk(min(1000, len(cls))).indices
    box = box[best] * STRIDES[0]
    boxes = torch.cat([points[best] - box[:, :2], points[best] + box[:, 2:]], 1)
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, size[1])
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, size[0])
    boxes = boxes / torch.tensor([*scale, *scale]).to(boxes)
    candidates = cls[best] > 0.05
    boxes, best = boxes[candidates], best[candidates]
    scores = cls[best] * centerness[best]
    kept = nms(boxes, scores, 0.5)[:100]
    return {
        "boxes": boxes[kept],
        "scores": scores[kept],
        "embeddings": functional.normalize(embeddings[best[kept]]),
    }
