"""A message is shown as it is, whatever the names in it would do to a terminal."""

import pytest

from alignps_jax.types import IncompleteError, UserError


@pytest.mark.parametrize("kind", [UserError, IncompleteError])
def test_what_a_terminal_would_act_on_is_escaped(kind):
    message = str(kind("a\x1b[2J\0\x85\u2028\udcff.jpg: found é√字𝄞,\nexpected more"))
    assert message == r"a\x1b[2J\x00\x85\u2028\udcff.jpg: found é√字𝄞," + "\nexpected more"


def test_an_endless_message_keeps_its_ends():
    message = str(UserError(f"begin {'x' * 10_000} end"))
    assert message.startswith("begin xxx")
    assert message.endswith("xxx end")
    assert " ... " in message
    assert len(message) < 1500
    assert str(UserError("x" * 1400)) == "x" * 1400
