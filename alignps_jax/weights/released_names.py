"""Names and layouts of the published PyTorch weights, and of ImageNet ResNet-50 files.

Our own names are the paths of a checkpoint's arrays, such as `params/neck/lateral3/kernel`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

# Applied one after another; levels are numbered from 3 here, from 0 there.
_RULES: list[tuple[str, str | Callable]] = [
    (r"^(params|frozen)/", ""),
    (r"/layer(\d)_(\d+)/", r"/layer\1/\2/"),
    (r"/downsample_conv/", "/downsample/0/"),
    (r"/downsample_bn/", "/downsample/1/"),
    (r"^neck/lateral(\d)", lambda found: f"neck/lateral_convs/{int(found[1]) - 3}"),
    (r"^neck/output([345])", lambda found: f"neck/fpn_convs/{int(found[1]) - 3}"),
    (r"^neck/output([67])", lambda found: f"neck/fpn_convs/{int(found[1]) - 3}/conv"),
    (r"^head/cls_tower/", "bbox_head/cls_convs/"),
    (r"^head/box_tower/", "bbox_head/reg_convs/"),
    (r"_convs/conv(\d)/", r"_convs/\1/conv/"),
    (r"_convs/norm(\d)/", r"_convs/\1/gn/"),
    (r"^head/cls_predictor/", "bbox_head/conv_cls/"),
    (r"^head/box_predictor/", "bbox_head/conv_reg/"),
    (r"^head/centerness_predictor/", "bbox_head/conv_centerness/"),
    (r"^head/scale(\d)$", r"bbox_head/scales/\1/scale"),
    (r"^rpn/", "rpn_head/rpn_"),
    (r"^roi/layer4/", "roi_head/shared_head/layer4/"),
    (r"^roi/(projector|fc_reg)(.*)_bn/", r"roi/\1\2/1/"),
    (r"^roi/(projector\d|fc_reg)/(?!1/)", r"roi/\1/0/"),
    (r"^roi/projector", "roi/embedding_head/projectors/"),
    (r"^roi/rescaler/", "roi/embedding_head/rescaler/"),
    (r"^roi/", "roi_head/bbox_head/"),
    (r"^mutual_information/hidden/", "mi_estimator/T_func/0/"),
    (r"^mutual_information/output/", "mi_estimator/T_func/2/"),
    (r"^roi_memory/lut$", "roi_head/bbox_head/loss_oim/lut"),
    (r"^roi_memory/queue$", "roi_head/bbox_head/loss_oim/cq"),
    (r"^memory/lut$", "bbox_head/labeled_matching_layer/lookup_table"),
    (r"^memory/(queue|tail)$", r"bbox_head/unlabeled_matching_layer/\1"),
    (r"/offset/", "/conv_offset/"),
    (r"^(?!bbox_head/scales)(.*)/(kernel|scale)$", r"\1/weight"),
    (r"/mean$", "/running_mean"),
    (r"/var$", "/running_var"),
]
# What only exists there: PyTorch's count of batches, memories that nothing reads, and in a model
# without background levels what makes P4 to P7.
_ONLY_RELEASED = re.compile(
    r"\.num_batches_tracked$|^(loss_oim|(un)?labeled_matching_layer)\."
    r"|^neck\.fpn_convs\.[1-4]\.|^bbox_head\.scales\.[1-4]\."
)
# Where self-supervised training has the backbone, and what it and a classifier have beside it.
_BACKBONE = re.compile(r"^(encoder_q|base_encoder|encoder|backbone|resnet|trunk)\.")
_NOT_BACKBONE = re.compile(
    r"^(fc|head|linear|classifier|projection_head|projector|prototypes|predictor)\."
    r"|^(encoder_k|momentum_encoder)\.|^queue(_ptr)?$"
)
_DETECTOR = re.compile(r"(^|\.)(neck|bbox_head)\.")


def released_name(path: str) -> str:
    """The released name of one of our arrays."""
    for pattern, replacement in _RULES:
        path = re.sub(pattern, replacement, path)
    return path.replace("/", ".")


LOOKUP_TABLE, QUEUE, TAIL = (released_name(f"memory/{name}") for name in ("lut", "queue", "tail"))


def unread_memories(width: int) -> dict[str, np.ndarray]:
    """The tensors that a released ROI-AlignPS holds beside its own memories: zeros."""
    rows = {"loss_oim.lut": 5532, "loss_oim.cq": 5000}
    rows |= {"labeled_matching_layer.lookup_table": 5532, "unlabeled_matching_layer.queue": 5000}
    zeros = {name: np.zeros((count, width), np.float32) for name, count in rows.items()}
    return zeros | {"unlabeled_matching_layer.tail": np.zeros((), np.int64)}


def is_detector(names: Collection[str]) -> bool:
    """Whether these are the names of a detector's tensors; else they are those of a backbone."""
    return any(map(_DETECTOR.search, names))


def kind_of(names: Iterable[str]) -> str:
    """What tensors of these names are taken for, and the name that decided."""
    if deciding := next(filter(_DETECTOR.search, names), None):
        return f"taken for a detector because of {deciding}"
    return "taken for a ResNet-50 because no name has neck. or bbox_head. in it"


def to_torch(array: np.ndarray, path: str = "/kernel") -> np.ndarray:
    """Our layout of the array of a path (kernels: HWIO, IO) to PyTorch's (OIHW, OI)."""
    return np.moveaxis(array, (-1, -2), (0, 1)) if path.endswith("/kernel") else array


def from_torch(array: np.ndarray, name: str) -> np.ndarray:
    """PyTorch's layout of the tensor of a name to ours."""
    is_kernel = array.ndim > 1 and name.endswith(".weight")
    return np.moveaxis(array, (0, 1), (-1, -2)) if is_kernel else array


def by_our_names(
    tensors: Mapping[str, np.ndarray], paths: Collection[str]
) -> dict[str, np.ndarray]:
    """The tensors of a detector or a ResNet, in our layout, by those of our `paths` that they are.

    Tensors without a path keep their names; those of training-only levels are left out. Raises
    ValueError if there are two backbones.
    """
    if not is_detector(tensors):
        tensors = _backbone_tensors(tensors)
    named = {released_name(path): path for path in paths}
    return {
        named.get(name, name): from_torch(tensor, name)
        for name, tensor in tensors.items()
        if name in named or not _ONLY_RELEASED.search(name)
    }


def _backbone_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of the backbone, named as in the released models, which have no `conv1.bias`."""
    renamed = [(_BACKBONE.sub("", name), value) for name, value in tensors.items()]
    renamed = [each for each in renamed if not _NOT_BACKBONE.search(each[0])]
    if len(named := dict(renamed)) < len(renamed):
        raise ValueError("found two backbones, expected one")
    # A bias before a norm goes into the norm's mean.
    for name in [name for name in named if re.search(r"(^|\.)conv\d\.bias$", name)]:
        mean = re.sub(r"conv(\d)\.bias$", r"bn\1.running_mean", name)
        if mean in named and named[mean].shape == named[name].shape:
            named[mean] = named[mean] - named.pop(name)
    return {f"backbone.{name}": value for name, value in named.items()}
