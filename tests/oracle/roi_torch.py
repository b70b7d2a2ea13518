"""The published ROI-AlignPS in plain PyTorch: the oracle of its parity tests.

Written from the facts about the published implementation, with torchvision's operators; of the JAX
code it shares the type of the random numbers. Where the released code gives NaN or fails (no
labeled person, location or detection), the term is 0 and the result empty.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, clip_boxes_to_image, nms, roi_align

from alignps_jax.types import RoiDraws
from tests.oracle import training_torch as dense
from tests.oracle.alignps_torch import AlignPS, ResNet50, Spec, buffers, detect
from tests.oracle.random_weights import random_state_dict

BACKGROUND, IGNORED = -1, -2  # instead of the index of a person
ANCHOR_CODER, ROI_CODER = BoxCoder((1, 1, 1, 1)), BoxCoder((10, 10, 5, 5))
DEAD = ("loss_oim.", "labeled_matching_layer.", "unlabeled_matching_layer.")

Found = tuple[Tensor, Tensor]  # embeddings and identities; -1: unlabeled, -2: background


@dataclasses.dataclass(frozen=True)
class RoiSpec(Spec):
    """The released models differ in the sizes of the memories only."""

    pre_nms: int = 12000
    proposals: int = 2000
    rois: int = 128  # of an image, half of them positive at most


@dataclasses.dataclass(frozen=True)
class TrainingBatch:
    """Pixels [B, 3, H, W], heights and widths before padding, and NumPy's random numbers."""

    pixels: Tensor
    people: dense.People
    sizes: list[tuple[int, int]]
    draws: RoiDraws


def roi_spec_of(dataset: str, **changes) -> RoiSpec:
    """The released model of "cuhk" or "prw"."""
    sizes = {"prw": {"lut_size": 483, "queue_size": 500}}
    return RoiSpec(**sizes.get(dataset, {}) | changes)


class ROIAlignPS(AlignPS):
    """`c4` is that of the last call, `header` the queue's next slot, which no file has."""

    def __init__(self, spec: RoiSpec):
        super().__init__(spec)
        c4, c5, channels = 16 * spec.width, 32 * spec.width, spec.channels
        self.c4, self.header = torch.empty(0), 0

        def normed(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs))

        def zeros(rows: int) -> Tensor:
            return torch.zeros(rows, channels)

        rpn = {"rpn_cls": nn.Conv2d(c4, 15, 1), "rpn_reg": nn.Conv2d(c4, 60, 1)}
        self.rpn_head = nn.ModuleDict({"rpn_conv": nn.Conv2d(c4, c4, 3, 1, 1)} | rpn)
        projectors = nn.ModuleList([normed(c4, channels // 2), normed(c5, channels // 2)])
        embedding = nn.ModuleDict({"projectors": projectors, "rescaler": nn.BatchNorm1d(1)})
        box_head = nn.ModuleDict({"embedding_head": embedding, "fc_reg": normed(c5, 4)})
        box_head["loss_oim"] = buffers(lut=zeros(spec.lut_size), cq=zeros(spec.queue_size))
        stage = nn.ModuleDict({"layer4": ResNet50(spec.width, ()).layer4})
        self.roi_head = nn.ModuleDict({"shared_head": stage, "bbox_head": box_head})
        hidden, last = nn.Linear(2 * channels, channels), nn.Linear(channels, 1)
        self.mi_estimator = nn.ModuleDict({"T_func": nn.Sequential(hidden, nn.ReLU(), last)})
        # Nobody uses these. The memories have these sizes in every released file.
        box_head["fc_cls"] = nn.Linear(c5, 2)
        self.loss_oim = buffers(lut=zeros(5532), cq=zeros(5000))
        self.labeled_matching_layer = buffers(lookup_table=zeros(5532))
        self.unlabeled_matching_layer = buffers(queue=zeros(5000), tail=torch.tensor(0))

    def forward(self, pixels: Tensor, train: bool = False) -> tuple[list, dict[str, Tensor]]:
        outputs, stages = super().forward(pixels, train)
        self.c4 = stages["C4"]
        return outputs, stages

    def rpn(self) -> tuple[Tensor, Tensor]:
        """Logits [B, A] and box deltas [B, A, 4] of the anchors."""
        x = functional.relu(self.rpn_head.rpn_conv(self.c4))
        logits, deltas = (self.rpn_head[k](x).permute(0, 2, 3, 1) for k in ("rpn_cls", "rpn_reg"))
        return logits.flatten(1), deltas.reshape(len(x), -1, 4)

    def rois(self, boxes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, logits and box deltas of all boxes (pixels), given image by image."""
        head = self.roi_head.bbox_head
        rois = roi_align(self.c4, boxes, 14, 1 / 16, sampling_ratio=0, aligned=True)
        maps = rois, self.roi_head.shared_head.layer4(rois)
        # Not `amax`: of equal values only the first gets the gradient.
        early, late = (functional.adaptive_max_pool2d(x, 1).flatten(1) for x in maps)
        first, second = head.embedding_head.projectors
        z = torch.cat([first(early), second(late)], 1)
        length = z.norm(dim=1, keepdim=True)
        logits = head.embedding_head.rescaler(length)[:, 0]
        return z / length.clamp(min=1e-12), logits, head.fc_reg(late)


def random_roi_model(spec: RoiSpec, gentle: bool) -> ROIAlignPS:
    """A model with random weights; the memories that nobody uses stay zero."""
    model = ROIAlignPS(spec)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(DEAD)}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    for key, value in random_state_dict(shapes, 1, gentle).items():
        state[key].copy_(torch.from_numpy(value))
    return model


@torch.no_grad()
def detect_with_rois(
    model: ROIAlignPS, pixels: Tensor, size: tuple[int, int], scale: tuple[float, float]
) -> dict[str, Tensor]:
    """`detect` for one image, with embeddings `dense`, `roi` and `embeddings`: both in one."""
    model.eval()
    outputs, _ = model(pixels)
    found = detect(outputs[0], size, scale)
    roi, _, _ = model.rois([found["boxes"] * torch.tensor([*scale, *scale]).to(found["boxes"])])
    both = functional.normalize(torch.cat([found["embeddings"], roi], 1))
    return found | {"dense": found["embeddings"], "roi": roi, "embeddings": both}


def make_anchors(height: int, width: int, like: Tensor) -> Tensor:
    """[height * width * 15, 4] for a map of stride 16."""
    sides = [(8 * s / r, 8 * s * r) for r in (0.5**0.5, 1.0, 2**0.5) for s in (2, 4, 8, 16, 32)]
    base = like.new_tensor([(-x, -y, x, y) for x, y in sides])
    cells = [(16 * x, 16 * y) * 2 for y in range(height) for x in range(width)]
    return (like.new_tensor(cells)[:, None] + base).flatten(0, 1)


def owners(
    boxes: Tensor, people: Tensor, negative: float, positive: float, lowest: float = math.inf
) -> Tensor:
    """Of each box the index of its person, BACKGROUND or IGNORED.

    The best boxes of a person are its own if their IoU is at least `lowest`.
    """
    iou = box_iou(people, boxes)
    best, person = boxes.new_zeros(len(boxes)), torch.zeros(len(boxes), dtype=torch.long)
    for index, row in enumerate(iou):
        person[row > best] = index
        best = best.maximum(row)
    owner = torch.full_like(person, IGNORED)
    owner[best < negative] = BACKGROUND
    owner[best >= positive] = person[best >= positive]
    for index, row in enumerate(iou):
        if len(row) and row.max() >= lowest:
            owner[row == row.max()] = index
    return owner


def sample(owner: Tensor, numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of positive and negative boxes: of each those with the smallest numbers, in order."""

    def smallest(eligible: Tensor, limit: int) -> Tensor:
        index = eligible.nonzero()[:, 0]
        return index[numbers[index].argsort(stable=True)[:limit]].sort().values

    positive = smallest(owner >= 0, count // 2)
    return positive, smallest(owner == BACKGROUND, count - len(positive))


@torch.no_grad()
def propose(
    logits: Tensor, deltas: Tensor, anchors: Tensor, size: tuple[int, int], spec: RoiSpec
) -> Tensor:
    """The proposals of one image, best first, from all anchors of its map."""
    scores = logits.sigmoid()
    best = scores.argsort(descending=True, stable=True)[: spec.pre_nms]
    limit = deltas.new_tensor([math.inf, math.inf, math.log(1000 / 16), math.log(1000 / 16)])
    boxes = ANCHOR_CODER.decode_single(deltas[best].clamp(-limit, limit), anchors[best])
    boxes = clip_boxes_to_image(boxes, size)
    return boxes[nms(boxes, scores[best], 0.7)[: spec.proposals]]


def sample_rois(
    proposals: Tensor, boxes: Tensor, identity: Tensor, numbers: Tensor, spec: RoiSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes and identities of the regions of one image, and deltas of the positive ones.

    `numbers` are for people, padded to any count, and then for `spec.proposals` proposals.
    """
    first = len(numbers) - spec.proposals
    numbers = torch.cat([numbers[: len(boxes)], numbers[first : first + len(proposals)]])
    candidates = torch.cat([boxes, proposals])
    owner = torch.cat([torch.arange(len(boxes)), owners(proposals, boxes, 0.1, 0.5)])
    positive, negative = sample(owner, numbers, spec.rois)
    deltas = ROI_CODER.encode_single(boxes[owner[positive]], candidates[positive])
    ids = torch.cat([identity[owner[positive]].long(), torch.full_like(negative, -2)])
    return candidates[torch.cat([positive, negative])], ids, deltas


def mutual_information(estimate: nn.Module, u: Found, v: Found, draws: RoiDraws) -> Tensor:
    labeled = [person for person in u[1].tolist() if person >= 0]
    ids = [p for p in dict.fromkeys(labeled) if p in v[1].tolist()]  # by first appearance
    if not ids:
        return u[0].sum() * 0
    first, second = (
        torch.stack([functional.normalize(x[of == p].mean(0), dim=0) for p in ids])
        for x, of in (u, v)
    )
    if (math.floor(99 * float(draws.gate)) + 1) % 3:
        first, second = first.detach(), second.detach()
    others = [math.floor(len(ids) * x) for x in draws.shuffle[: len(ids)].tolist()]
    joint, mixed = (estimate(torch.cat([first, x], 1)) for x in (second, second[others]))
    return -0.2 * (joint.mean() - (mixed.logsumexp((0, 1)) - math.log(len(ids))))


def losses(model: ROIAlignPS, batch: TrainingBatch) -> tuple[dict[str, Tensor], Found, Found]:
    """Every term, and what locations and regions have to be remembered."""
    model.train().roi_head.shared_head.eval()
    terms, embeddings, identity = dense.losses(model, batch.pixels, batch.people)
    if embeddings.ndim == 0:  # no positive location
        terms["triplet"], identity = embeddings, torch.zeros(0)
        embeddings = model.c4.new_zeros(0, model.spec.channels)
    terms["oim"] = terms["oim"] * len(identity) / max(int((identity >= 0).sum()), 1)
    logits, deltas = model.rpn()
    anchors, columns = make_anchors(*model.c4.shape[2:], deltas), model.c4.shape[3]
    cell = torch.arange(len(anchors)) // 15
    count, cls, box, sampled = 0, [], [], []
    for image, (people, ids) in enumerate(batch.people):
        height, width = size = batch.sizes[image]
        inside = (cell // columns < -(-height // 32) * 2) & (cell % columns < -(-width // 32) * 2)
        inside &= (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
        owner = torch.full_like(cell, IGNORED)
        owner[inside] = owners(anchors[inside], people, 0.3, 0.7, 0.3)
        positive, negative = sample(owner, torch.tensor(batch.draws.rpn[image]), 256)
        cls += [logits[image, positive], -logits[image, negative]]
        targets = ANCHOR_CODER.encode_single(people[owner[positive]], anchors[positive])
        box.append(deltas[image, positive] - targets)
        count += max(len(positive), 1) + max(len(negative), 1)
        proposals = propose(logits[image], deltas[image], anchors, size, model.spec)
        numbers = torch.tensor(batch.draws.roi[image])
        sampled.append(sample_rois(proposals, people, ids, numbers, model.spec))
    terms["rpn_cls"] = -functional.logsigmoid(torch.cat(cls)).sum() / count
    terms["rpn_box"] = torch.cat(box).abs().sum() / count
    boxes, identities, targets = zip(*sampled, strict=True)
    found, logits, deltas = model.rois(list(boxes))
    ids, memory = torch.cat(identities), model.roi_head.bbox_head.loss_oim
    positive = ids > -2
    terms["roi_cls"] = functional.binary_cross_entropy_with_logits(logits, positive.to(logits))
    terms["roi_box"] = 10 * (deltas[positive] - torch.cat(targets)).abs().sum() / len(ids)
    scores = 30 * found[positive] @ torch.cat([memory.lut, memory.cq]).T
    oim = functional.cross_entropy(scores, ids[positive], ignore_index=-1, reduction="sum")
    terms["roi_oim"] = oim / max(int((ids >= 0).sum()), 1)
    regions, locations, estimate = (found, ids), (embeddings, identity), model.mi_estimator.T_func
    terms["mutual_information"] = mutual_information(estimate, regions, locations, batch.draws)
    return terms, locations, regions


@torch.no_grad()
def update_memories(model: ROIAlignPS, locations: Found, regions: Found) -> None:
    """One location, one region after another."""
    dense.update_memory(model, *locations)
    memory = model.roi_head.bbox_head.loss_oim
    for feature, person in zip(regions[0], regions[1].tolist(), strict=True):
        if person >= 0:
            row = 0.5 * memory.lut[person] + 0.5 * feature
            memory.lut[person] = row / row.norm()
        elif person == -1:
            memory.cq[model.header] = feature
            model.header = (model.header + 1) % len(memory.cq)


def train(
    model: ROIAlignPS,
    batches: Iterable[TrainingBatch],
    *,
    rate: float = 0.0015,
    weight_decay: float = 5e-4,
    warmup: int = 1141,
    drops: tuple[int, ...] = (),
    clip_norm: float = 10.0,
) -> Iterator[tuple[dict[str, float], dict[str, Tensor]]]:
    """After each step: its losses and gradients (before clipping), by name.

    `warmup` and `drops` are in steps.
    """
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), rate, 0.9, weight_decay=weight_decay)
    for step, batch in enumerate(batches):
        terms, locations, regions = losses(model, batch)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        parameters = {k: p for k, p in trained.items() if p.grad is not None}
        gradients = {k: p.grad.clone() for k, p in parameters.items()}
        dense.clip(parameters.values(), clip_norm)
        warm = 1 - max(1 - step / warmup, 0) * (1 - 1 / 200)
        optimizer.param_groups[0]["lr"] = rate * warm * 0.1 ** sum(step >= drop for drop in drops)
        optimizer.step()
        update_memories(model, locations, regions)
        yield {k: float(x.detach()) for k, x in terms.items()}, gradients
