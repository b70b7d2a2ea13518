"""A validation split by identity: people of the training split who are not trained on.

A photo with a held-out person leaves training with all its other people: the network would see the
held-out person, or learn that nobody is there. In the validation split, nobody searches the others.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.prepared import PreparedSplit
from data_pipeline.sources.source import Query, search_everywhere

# A random stream of its own, so that other draws with the same seed do not change it.
_STREAM = 0x7A11D


@dataclasses.dataclass(frozen=True)
class Part:
    """Some photos of a split: their positions in it, and a new number for each identity.

    `numbering` is -1 for identities of which no photo is here; the others count from 0.
    """

    images: Int[np.ndarray, "n"]
    numbering: Int[np.ndarray, "L"]

    @property
    def num_identities(self) -> int:
        return int((self.numbering >= 0).sum())

    def people(self, split: Annotations) -> Annotations:
        """The people of these photos, renumbered."""
        new = np.append(self.numbering, np.int32(-1))  # -1 stays -1
        images = self.images.tolist()
        return Annotations(
            names=tuple(split.names[i] for i in images),
            boxes=tuple(split.boxes[i] for i in images),
            identity=tuple(new[np.where(split.labeled[i], split.identity[i], -1)] for i in images),
            labeled=tuple(split.labeled[i] for i in images),
            camera=split.camera[self.images],
        )

    def photos(self, split: PreparedSplit) -> PreparedSplit:
        """These photos of a prepared split, with their people."""
        return dataclasses.replace(
            split,
            annotations=self.people(split.annotations),
            sizes=split.sizes[self.images],
            encoded=lambda image: split.encoded(int(self.images[image])),
        )


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A training split in two parts without a common photo, and the search in the second one.

    `identities`, as numbered in the split, are in no photo of `train`. `protocol` searches each of
    their appearances in all other photos of `validation`.
    """

    train: Part
    validation: Part
    identities: Int[np.ndarray, "k"]
    protocol: SearchProtocol

    def __str__(self) -> str:
        photos = len(self.train.images) + len(self.validation.images)
        everybody = ((self.train.numbering >= 0) | (self.validation.numbering >= 0)).sum()
        return (
            f"validation: {len(self.identities):,} of {everybody:,} identities are held out, and "
            f"with them {len(self.validation.images):,} of {photos:,} training photos; "
            f"{len(self.protocol.query_image):,} queries; {self.train.num_identities:,} identities "
            "are left to train on"
        )


def hold_out(people: Annotations, fraction: float, seed: int) -> HeldOut:
    """Draws the share `fraction` of the identities, one at least, and divides the photos.

    The same seed draws the same identities; a larger fraction draws them too.

    Raises:
      UserError: nobody is held out who is in two photos, or no identity is left to train on.
    """
    shown = [ids[mask] for ids, mask in zip(people.identity, people.labeled, strict=True)]
    known = np.unique(np.concatenate([np.zeros(0, np.int32), *shown]))
    count = min(len(known), max(1, round(fraction * len(known))))
    held = np.sort(np.random.default_rng((seed, _STREAM)).permutation(known)[:count])
    leaves = np.array([np.isin(ids, held).any() for ids in shown], bool)
    train, validation = (
        _part(shown, np.flatnonzero(mask), people.num_identities) for mask in (~leaves, leaves)
    )
    protocol = _search(validation.people(people), validation.numbering[held])
    if not (len(protocol.query_image) and train.num_identities):
        problem = "nobody is left to train on" if not train.num_identities else "none in two photos"
        raise UserError(
            f"config.data.validation_fraction: found {fraction:g}, which holds out {count} of "
            f"{len(known)} identities: {problem}; expected another share, or another seed"
        )
    return HeldOut(train, validation, held, protocol)


def _part(shown: Sequence[np.ndarray], images: Int[np.ndarray, "n"], identities: int) -> Part:
    present = np.unique(np.concatenate([np.zeros(0, np.int32), *(shown[i] for i in images)]))
    numbering = np.full(identities, -1, np.int32)
    numbering[present] = np.arange(len(present))
    return Part(images, numbering)


def _search(people: Annotations, wanted: Int[np.ndarray, "k"]) -> SearchProtocol:
    """Every photo of each of these identities asks for the others; the first box there counts."""
    queries: dict[tuple[int, int], Query] = {}
    rows = zip(people.identity, people.labeled, people.boxes, strict=True)
    for image, (ids, labeled, boxes) in enumerate(rows):
        for row in np.flatnonzero(labeled & np.isin(ids, wanted)).tolist():
            person = int(ids[row])
            queries.setdefault((image, person), (image, boxes[row], person))
    return search_everywhere("validation", people, list(queries.values()))
