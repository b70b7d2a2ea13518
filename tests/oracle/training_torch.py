"""The released training step in plain PyTorch: targets, losses, memory and SGD."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, MultiStepLR
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from tests.oracle.alignps_torch import STRIDES, AlignPS, locations, rows

# Per image: boxes [G, 4] and identities [G], -1 for people without one.
People = list[tuple[Tensor, Tensor]]


def assign(height: int, width: int, boxes: Tensor) -> list[tuple[int, int, Tensor]]:
    """(location, box, distances in strides) of every positive location of P3, row by row."""
    stride = STRIDES[0]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    found = []
    for index, (x, y) in enumerate(locations(height, width, stride).tolist()):
        best = None
        for person, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            center_x, center_y, radius = (x1 + x2) / 2, (y1 + y2) / 2, 1.5 * stride
            inside = max(x1, center_x - radius) < x < min(x2, center_x + radius) and max(
                y1, center_y - radius
            ) < y < min(y2, center_y + radius)
            if inside and (best is None or areas[person] < areas[best]):
                best = person
        if best is not None:
            x1, y1, x2, y2 = boxes[best]
            distances = torch.stack([x - x1, y - y1, x2 - x, y2 - y]) / stride
            found.append((index, best, distances))
    return found


def triplet(embeddings: Tensor, identity: Tensor, lut: Tensor) -> Tensor:
    """Batch-hard, margin 0.3, over labeled embeddings and their table rows (not identity 0's)."""
    with_row = identity > 0
    samples = torch.cat([embeddings, lut[identity[with_row]]])
    identity = torch.cat([identity, identity[with_row]])
    if len(identity.unique()) < 2:
        return embeddings.sum() * 0
    distance = (samples[:, None] - samples[None]).pow(2).sum(2).clamp(min=1e-12).sqrt()
    losses = []
    for anchor in range(len(samples)):
        same = identity == identity[anchor]
        losses.append(
            functional.relu(distance[anchor][same].max() - distance[anchor][~same].min() + 0.3)
        )
    return torch.stack(losses).mean()


def oim(embeddings: Tensor, identity: Tensor, lut: Tensor, queue: Tensor, t: float) -> Tensor:
    logits = torch.cat([t * embeddings @ lut.T, 10.0 * embeddings @ queue.T], 1)
    log_p = logits.log_softmax(1)
    losses = [
        -((1 - log_p[row, person].exp()) ** 2) * log_p[row, person]
        if person >= 0
        else 0 * log_p[row, 0]
        for row, person in enumerate(identity.tolist())
    ]
    return torch.stack(losses).mean()


def losses(model: AlignPS, pixels: Tensor, people: People) -> tuple[dict, Tensor, Tensor]:
    """Every loss term, and the embeddings (normalized) and identities of the positives."""
    outputs, _ = model(pixels, train=True)
    first, spec, zero = outputs[0], model.spec, pixels.sum() * 0
    flat_cls = [
        torch.cat([rows(o["cls"][image])[:, 0] for o in outputs]) for image in range(len(pixels))
    ]
    targets = [torch.zeros_like(logits) for logits in flat_cls]
    box, centerness, wanted, embeddings, identity = [], [], [], [], []
    for image, (boxes, ids) in enumerate(people):
        # Of all levels: the scales of those without positives get a gradient of zero, hence decay.
        predicted = {key: torch.cat([rows(o[key][image]) for o in outputs]) for key in first}
        for index, person, distances in assign(*first["cls"].shape[2:], boxes):
            targets[image][index] = 1
            box.append(predicted["box"][index])
            centerness.append(predicted["centerness"][index, 0])
            embeddings.append(functional.normalize(predicted["embeddings"][index], dim=0))
            wanted.append(distances)
            identity.append(ids[person])
    cls = sigmoid_focal_loss(torch.cat(flat_cls), torch.cat(targets), reduction="sum")
    cls = cls / (len(box) + len(pixels))
    if not box:
        return {"cls": cls, "box": zero, "centerness": zero, "oim": zero}, zero, zero
    box, centerness, wanted = torch.stack(box), torch.stack(centerness), torch.stack(wanted)
    embeddings, identity = torch.stack(embeddings), torch.stack(identity)
    around = wanted.new_tensor([-1, -1, 1, 1])  # boxes by their distances from one point
    giou = generalized_box_iou_loss(box * around, wanted * around, eps=0)
    pairs = torch.stack([wanted[:, 0::2], wanted[:, 1::2]], 1)
    weight = (pairs.min(2).values / pairs.max(2).values).prod(1).sqrt()
    head = model.bbox_head
    lut, queue = head.labeled_matching_layer.lookup_table, head.unlabeled_matching_layer.queue
    terms = {
        "cls": cls,
        "box": (giou * weight).sum() / weight.sum(),
        "centerness": functional.binary_cross_entropy_with_logits(centerness, weight),
        "oim": oim(embeddings, identity, lut, queue, spec.lut_temperature),
    }
    if spec.triplet:
        labeled = identity >= 0
        terms["triplet"] = triplet(embeddings[labeled], identity[labeled], lut)
    return terms, embeddings, identity


@torch.no_grad()
def update_memory(model: AlignPS, embeddings: Tensor, identity: Tensor) -> None:
    """One positive location after another; of a queue's slot only 64 channels are written."""
    head, spec = model.bbox_head, model.spec
    lut = head.labeled_matching_layer.lookup_table
    queue, tail = head.unlabeled_matching_layer.queue, head.unlabeled_matching_layer.tail
    for feature, person in zip(embeddings, identity.tolist(), strict=True):
        if person >= 0:
            lut[person] = 0.5 * lut[person] + 0.5 * feature
            if spec.normalize_lut:
                lut[person] = lut[person] / lut[person].norm()
        else:
            queue[tail, :64] = feature[:64]
            tail.copy_((tail + 1) % len(queue))


def remember(model: AlignPS, batches: list[tuple[Tensor, People]]) -> None:
    """Fills the memory with the embeddings that the model has for these batches."""
    for pixels, people in batches:
        with torch.no_grad():
            _, embeddings, identity = losses(model, pixels, people)
        update_memory(model, embeddings, identity)


def clip(parameters: Collection[nn.Parameter], limit: float) -> None:
    """Scales gradients to a norm of at most `limit`, without the 1e-6 that PyTorch adds to it."""
    norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
    for parameter in parameters:
        parameter.grad *= (limit / norm).clamp(max=1)


class Trainer:
    """SGD with the released rules; `drops` and `warmup` in steps.

    `gradients` are those of the last step, by name, before clipping.
    """

    def __init__(
        self,
        model: AlignPS,
        *,
        weight_decay: float,
        warmup: int,
        drops: tuple[int, ...],
        clip_norm: float = 35.0,
        rate: float = 0.001,
    ):
        self.model, self.clip_norm = model, clip_norm
        groups = [{"params": [], "lr": rate}, {"params": [], "lr": 2 * rate, "weight_decay": 0.0}]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[int(has_bias_rule(name))]["params"].append(parameter)
        self.optimizer = SGD(groups, momentum=0.9, weight_decay=weight_decay)
        start = LinearLR(self.optimizer, 1 / 3, total_iters=warmup)
        self.schedule = ChainedScheduler([start, MultiStepLR(self.optimizer, drops)])

    def step(self, pixels: Tensor, people: People) -> dict[str, float]:
        """One update of parameters and memory; the losses before it."""
        terms, embeddings, identity = losses(self.model, pixels, people)
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        reached = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        self.gradients = {name: p.grad.clone() for name, p in reached.items()}
        clip(reached.values(), self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        if embeddings.ndim:
            update_memory(self.model, embeddings, identity)
        return {name: float(value.detach()) for name, value in terms.items()}


def has_bias_rule(name: str) -> bool:
    """Biases of plain and DCNv2 main convolutions: twice the rate, no decay."""
    return name.endswith(".bias") and "conv_offset" not in name and ".gn." not in name
