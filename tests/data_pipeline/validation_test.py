"""Nobody who is held out is seen in training, whatever the photos are shared with."""

import numpy as np
import pytest

from alignps_jax.types import Annotations, UserError
from data_pipeline.prepared import PreparedSplit
from data_pipeline.validation import hold_out


def annotations(*photos: list[int]) -> Annotations:
    """A photo for each list of identities; a negative one is a person without identity."""
    identity = tuple(np.array(ids, np.int32) for ids in photos)
    return Annotations(
        names=tuple(f"{number}.jpg" for number in range(len(photos))),
        boxes=tuple(
            np.float32([[9 * n, i, 9 * n + 5, i + 7] for n in range(len(ids))]).reshape(-1, 4)
            for i, ids in enumerate(photos)
        ),
        identity=tuple(np.maximum(ids, -1) for ids in identity),
        labeled=tuple(ids >= 0 for ids in identity),
        camera=np.arange(len(photos)),
    )


def crowd(seed: int = 0, photos: int = 120, identities: int = 40) -> Annotations:
    rng, everybody = np.random.default_rng(seed), np.arange(-3, identities)
    counts = [rng.integers(0, 4) for _ in range(photos)]
    return annotations(*(rng.choice(everybody, n, replace=False).tolist() for n in counts))


def labeled(people: Annotations, images) -> set[int]:
    rows = (people.identity[image][people.labeled[image]] for image in images)
    return set(np.concatenate([np.zeros(0, np.int32), *rows]).tolist())


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_the_parts_share_no_photo_and_training_nobody_who_is_held_out(fraction, seed):
    people = crowd()
    held = hold_out(people, fraction, seed)
    images = [*held.train.images.tolist(), *held.validation.images.tolist()]
    assert sorted(images) == list(range(len(people.names)))
    assert len(held.identities) == max(1, round(fraction * len(labeled(people, images))))
    assert not labeled(people, held.train.images) & set(held.identities.tolist())
    for image in held.validation.images.tolist():
        assert labeled(people, [image]) & set(held.identities.tolist())


def test_people_are_renumbered_without_gaps_and_stay_who_they_are_in_their_photos():
    people = crowd(1)
    held, count = hold_out(people, 0.2, 0), len(people.names)
    sizes = np.arange(2 * count, dtype=np.int32).reshape(-1, 2)
    prepared = PreparedSplit(people, sizes, lambda image: people.names[image].encode())
    for part in (held.train, held.validation):
        photos, split = part.photos(prepared), part.people(people)
        np.testing.assert_array_equal(photos.sizes, sizes[part.images])
        assert photos.annotations.names == split.names
        assert labeled(split, range(len(split.names))) == set(range(part.num_identities))
        assert split.num_identities == part.num_identities
        old_of_new: dict[int, int] = {}
        for new, image in enumerate(part.images.tolist()):
            assert split.names[new] == people.names[image] == photos.encoded(new).decode()
            assert split.camera[new] == people.camera[image]
            np.testing.assert_array_equal(split.boxes[new], people.boxes[image])
            np.testing.assert_array_equal(split.labeled[new], people.labeled[image])
            mask = people.labeled[image]
            assert (split.identity[new][~mask] == -1).all()
            pairs = zip(split.identity[new][mask], people.identity[image][mask], strict=True)
            for number, old in pairs:
                assert old_of_new.setdefault(int(number), int(old)) == old
        assert len(set(old_of_new.values())) == len(old_of_new)


def test_the_seed_decides_and_a_larger_fraction_holds_out_more():
    people = crowd(2)
    first, again = (hold_out(people, 0.1, 5) for _ in range(2))
    np.testing.assert_array_equal(first.identities, again.identities)
    assert set(first.identities) < set(hold_out(people, 0.3, 5).identities)
    draws = {hold_out(people, 0.1, seed).identities.tobytes() for seed in range(6)}
    assert len(draws) > 3


def test_each_appearance_of_the_held_out_asks_for_all_others():
    people = crowd(3)
    held = hold_out(people, 0.2, 1)
    split, protocol = held.validation.people(people), held.protocol
    wanted = set(held.validation.numbering[held.identities].tolist())
    everywhere, expected, found = range(len(split.names)), {}, {}
    for image in everywhere:
        for identity in labeled(split, [image]) & wanted:
            others = [x for x in everywhere if x != image and identity in labeled(split, [x])]
            expected |= {(image, identity): others} if others else {}
    rows = zip(protocol.query_image.tolist(), protocol.query_box, strict=True)
    for query, (image, box) in enumerate(rows):
        (row,) = np.flatnonzero((split.boxes[image] == box).all(axis=1))
        found[image, int(split.identity[image][row])] = protocol.target_images[query].tolist()
        assert protocol.gallery[query].tolist() == [x for x in everywhere if x != image]
    assert found == expected
    assert protocol.name == "validation"


def test_a_shared_photo_leaves_training_with_its_other_people():
    people = annotations([0, 1], [0], [1], [1, 2], [2], [2, -2], [])
    held = next(held for seed in range(20) if 0 in (held := hold_out(people, 0.3, seed)).identities)
    assert held.identities.tolist() == [0]
    assert held.validation.images.tolist() == [0, 1]
    assert held.train.images.tolist() == [2, 3, 4, 5, 6]
    # Person 1 stays in photo 0, where nobody asks for her: two queries, both for person 0.
    assert held.validation.people(people).identity[0].tolist() == [0, 1]
    assert held.protocol.query_image.tolist() == [0, 1]
    twice = annotations([0, 0], [0], [1], [1])
    both = next(both for seed in range(20) if 0 in (both := hold_out(twice, 0.5, seed)).identities)
    assert both.protocol.query_image.tolist() == [0, 1]
    np.testing.assert_array_equal(both.protocol.query_box[0], twice.boxes[0][0])
    assert str(held) == (
        "validation: 1 of 3 identities are held out, and with them 2 of 7 training photos; "
        "2 queries; 2 identities are left to train on"
    )


@pytest.mark.parametrize(
    ("photos", "fraction", "message"),
    [
        ([[0, 1, 2], [0, 1, 2], [-2]], 0.1, "nobody is left to train on"),
        ([[0], [1], [2]], 0.3, "holds out 1 of 3 identities: none in two photos"),
        ([[-2], []], 0.5, "holds out 0 of 0 identities"),
    ],
)
def test_what_cannot_be_parted_is_one_line(photos, fraction, message):
    with pytest.raises(UserError, match=rf"^config\.data\.validation_fraction: .*{message}"):
        hold_out(annotations(*photos), fraction, 0)
