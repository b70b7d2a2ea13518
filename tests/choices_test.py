"""Names are found in a table; wrong ones are answered with the nearest, in one line."""

import pytest

from alignps_jax.choices import choose, known_name
from alignps_jax.types import UserError

TABLE = {"detected": 1, "ground_truth": 2, "GroundUp": 3}


def test_the_entry_of_a_name():
    assert [choose("field", name, TABLE) for name in TABLE] == [1, 2, 3]
    assert known_name("field", "detected", ("detected",)) == "detected"


@pytest.mark.parametrize(
    ("found", "near"),
    [
        ("groundtruth", "ground_truth"),
        ("DETECTED", "detected"),  # no name but for its case
        ("det", "detected"),  # a beginning
        ("groundup", "GroundUp"),
        ("xyz", None),
        ("", None),
        (None, None),
        (3, None),
        (("detected",), "detected"),
        (["detected"], "detected"),  # not hashable
    ],
)
def test_another_name_is_one_line_with_the_nearest(found, near):
    with pytest.raises(UserError) as error:
        choose("config.eval.boxes", found, TABLE)
    hint = f"; did you mean {near!r}?" if near else ""
    expected = "expected one of detected, ground_truth, GroundUp"
    assert str(error.value) == f"config.eval.boxes: found {found!r}, {expected}{hint}"
