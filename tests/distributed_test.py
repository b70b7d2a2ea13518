"""Processes of one run: they find one another, agree, and none is left alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from alignps_jax import distributed
from alignps_jax.devices import gather_rows
from tests.places import ROOT, free_port
from tests.runs import finish, run_one, start_pair


def child(index: int, workdir: str) -> int:
    folder = Path(workdir)
    with distributed.main_process_first():
        seen = (folder / "made").exists()
        if index == 0:
            time.sleep(0.5)
            (folder / "made").touch()
    print("made before" if seen else "not made before")
    print(distributed.broadcast_from_main({"from": index}), distributed.is_main_process())
    print(distributed.gather(["a word", index]))
    print(gather_rows({"a": np.full((1 + index, 2), index)})["a"].tolist())
    if index == 0:
        time.sleep(2)  # writes results
        (folder / "results").touch()
    return 0


def test_they_agree_one_after_the_other_and_end_together(tmp_path):
    outputs = finish(start_pair(__name__, str(tmp_path)))
    first, second = ([x for x in out.splitlines() if "Gloo" not in x] for out in outputs)
    gathered = ["[['a word', 0], ['a word', 1]]", "[[0, 0], [1, 1], [1, 1]]"]
    assert first == ["not made before", "{'from': 0} True", *gathered]
    assert second == ["made before", "{'from': 0} False", *gathered]
    assert (tmp_path / "results").exists()


def test_a_process_whose_peers_do_not_come_says_whom_it_waits_for():
    port = free_port()
    code = f"""if True:
        from alignps_jax import distributed
        distributed.REMINDER = 1
        distributed.join("127.0.0.1:{port}", 2, 0)
    """
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said = [process.stderr.readline() for _ in range(2)]
    process.kill()
    process.communicate()
    assert said == [f"waited {n} s for all 2 processes at 127.0.0.1:{port}\n" for n in (1, 2)]


if __name__ == "__main__":
    run_one(child)
