"""Processes of one run: they find one another, agree, and none is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignps_jax import peers
from alignps_jax.types import UserError
from tests.places import ROOT, free_port

BEAT = 10  # seconds, the shortest that JAX takes

OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911"}


def start(
    what: str, count: int, folder: Path, started: int | None = None
) -> list[subprocess.Popen[str]]:
    """So many processes, or the first of them, as Open MPI starts them; `what` is a child's name.

    They wait 5 s for one another where not all are started, else a minute.
    """
    port, patience = str(free_port()), "5" if started else "60"
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.peers_test", what, str(index), str(folder), patience],
            cwd=ROOT,
            env={
                **os.environ,
                **OPEN_MPI,
                "OMPI_COMM_WORLD_SIZE": str(count),
                "OMPI_COMM_WORLD_RANK": str(index),
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "JAX_COORDINATOR_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(started or count)
    ]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, list[str], list[str]]]:
    """Exit code, output and errors of each."""
    try:
        texts = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    return [
        (code, out.splitlines(), err.splitlines())
        for code, (out, err) in zip(codes, texts, strict=True)
    ]


def child_agrees(index: int, folder: Path) -> int:
    with peers.first_process_first():
        seen = (folder / "made").exists()
        if index == 0:
            time.sleep(0.5)
            (folder / "made").touch()
    print("made before" if seen else "not made before")
    print(peers.agree(lambda: {"from": index}), peers.leads())
    if index == 0:
        time.sleep(2)  # writes results
        (folder / "results").touch()
    return 0


def child_refuses(index: int, folder: Path) -> int:
    try:
        with peers.first_process_first():
            if index == 0:
                raise UserError("no such data set")
    except UserError as error:
        print(error)
        return error.exit_code
    return 0


def child_waits(index: int, folder: Path) -> int:
    print("ready", flush=True)
    time.sleep(100)
    return 0


def child_fails_alone(index: int, folder: Path) -> int:
    if index == 1:
        raise ValueError("a defect")
    return child_waits(index, folder)


def test_they_agree_one_after_the_other_and_end_together(tmp_path):
    start_time = time.monotonic()
    first, second = ends(start("agrees", 2, tmp_path))
    assert first == (0, ["not made before", "{'from': 0} True"], [])
    assert second == (0, ["made before", "{'from': 0} False"], [])
    assert (tmp_path / "results").exists()
    assert time.monotonic() - start_time < 60


def test_what_process_0_cannot_prepare_ends_all_with_a_line_each(tmp_path):
    first, second = ends(start("refuses", 2, tmp_path))
    assert first == (2, ["no such data set"], [])
    assert second == (2, ["process 0 of the run failed, for the reason that it gives"], [])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_a_line(victim, tmp_path):
    processes = start("waits", 2, tmp_path)
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    processes[victim].kill()
    results = ends(processes)
    assert results[victim][0] == -signal.SIGKILL
    code, out, err = results[1 - victim]
    assert (code, out) == (peers.LOST_PEER, [])
    assert err == [
        f"error: process {victim} of the run ended or does not answer, so this one ends, too; "
        "the same commands resume from the last checkpoint"
    ]


def test_a_process_that_fails_alone_ends_the_others(tmp_path):
    first, second = ends(start("fails_alone", 2, tmp_path))
    assert second[0] == 1
    assert second[2][-1] == "ValueError: a defect"
    assert first[0] == peers.LOST_PEER
    assert len(first[2]) == 1


def test_a_process_whose_peer_does_not_come_says_so(tmp_path):
    alone, *_ = start("agrees", 2, tmp_path, started=1)
    ((code, out, err),) = ends([alone])
    assert (code, out) == (peers.LOST_PEER, [])
    assert err == ["error: the processes of the run did not all come within 5 s, so this one ends"]


def test_without_a_cluster_it_is_one_line():
    # Not this machine's own cluster, should it have one.
    managers = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_")
    plain = {name: x for name, x in os.environ.items() if not name.startswith(managers)}
    done = subprocess.run(
        [sys.executable, "launch.py", "--config=configs/tiny.py", "--distributed"],
        cwd=ROOT,
        env=plain,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --distributed: found no cluster that can be used")
    assert "SLURM (srun)" in line


def test_a_run_of_one_process_waits_for_nobody():
    assert not peers.several()
    assert peers.leads()
    assert peers.agree(lambda: 3) == 3
    with peers.first_process_first():
        pass
    assert peers.end_together(lambda: 3) == 3
    with pytest.raises(SystemExit):
        peers.end_together(lambda: sys.exit(143))


def run_child(name: str, index: int, folder: Path, patience: int) -> int:
    peers.join(heartbeat=BEAT, start=patience)
    return globals()[f"child_{name}"](index, folder)


if __name__ == "__main__":
    name, number, place, seconds = sys.argv[1:]
    sys.exit(peers.end_together(lambda: run_child(name, int(number), Path(place), int(seconds))))
