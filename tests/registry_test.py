"""Names are found in a table; a wrong one is answered with the nearest, in one line."""

import pytest

from alignps_jax.registry import choose
from alignps_jax.types import UserError

TABLE = {"detected": 1, "ground_truth": 2, "GroundUp": 3}


def test_the_entry_of_a_name():
    assert [choose("field", name, TABLE) for name in TABLE] == [1, 2, 3]


@pytest.mark.parametrize(
    ("found", "near"),
    [("groundtruth", "ground_truth"), ("DETECTED", "detected"), ("groundup", "GroundUp")]
    + [(other, None) for other in ("xyz", "", None, 3)]
    + [(("detected",), "detected"), (["detected"], "detected")],
)
def test_another_name_is_one_line_with_the_nearest(found, near):
    with pytest.raises(UserError) as error:
        choose("config.eval.boxes", found, TABLE)
    hint = f"; did you mean {near!r}?" if near else ""
    expected = "expected one of detected, ground_truth, GroundUp"
    assert str(error.value) == f"config.eval.boxes: found {found!r}, {expected}{hint}"
