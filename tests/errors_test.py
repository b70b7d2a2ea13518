"""What becomes of errors, of the names in their messages, and of a name that is in no table."""

import pytest

from alignps_jax.errors import IncompleteError, UserError, blame, known_name


@pytest.mark.parametrize("kind", [UserError, IncompleteError])
def test_control_characters_are_escaped(kind):
    message = str(kind("a\x1b[2J\0\x85\u2028\udcff.jpg: found é√字𝄞,\nexpected more"))
    assert message == r"a\x1b[2J\x00\x85\u2028\udcff.jpg: found é√字𝄞," + "\nexpected more"


def test_a_bad_value_is_blamed_on_its_file_and_nothing_else_is():
    with pytest.raises(UserError, match=r"^a\.json: found 3, expected 4$"), blame("a.json"):
        raise ValueError("found 3, expected 4")
    for error in (OSError(28, "No space left on device"), UserError("b.json: bad"), MemoryError()):
        with pytest.raises(type(error)) as caught, blame("a.json"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("found", "near"),
    [
        *[("groundtruth", "ground_truth"), ("DETECTED", "detected"), ("groundup", "GroundUp")],
        *[("det", "detected"), ("xyz", None), (None, None), (["detected"], "detected")],
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(found, near):
    names = ("detected", "ground_truth", "GroundUp")
    assert [known_name("field", name, names) for name in names] == [*names]
    with pytest.raises(UserError) as error:
        known_name("config.eval.boxes", found, names)
    hint = f"; did you mean {near!r}?" if near else ""
    expected = "expected one of detected, ground_truth, GroundUp"
    assert str(error.value) == f"config.eval.boxes: found {found!r}, {expected}{hint}"
