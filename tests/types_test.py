"""What becomes of errors and of the names in their messages."""

import pytest

from alignps_jax.types import IncompleteError, UserError, blame


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
    assert not issubclass(UserError, ValueError)
