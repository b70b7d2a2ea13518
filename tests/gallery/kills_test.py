"""kill -9 at any moment: nobody twice, nobody missing."""

from __future__ import annotations

from tests.gallery.finder import content, run
from tests.gallery.kills import FILES, kill_often, processes, write_files


def test_kills_leave_nobody_twice_and_nobody_missing(tmp_path):
    address, whole = str(tmp_path / "people.lance"), str(tmp_path / "whole.lance")
    photos = str(write_files(tmp_path / "photos"))
    kill_often(processes(), address, photos, kills=10, seed=5)
    run(address, photos)
    run(whole, photos)
    assert content(address) == content(whole)
    assert run(address, photos).known == FILES
