"""Index, search, group, detect, export and forget, as they are typed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import launch
from alignps_jax.checkpoint.places import chosen_step
from alignps_jax.evaluation.calibration import LIMIT, NOBODY, Calibration
from alignps_jax.gallery.entries import content_hash
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.groups import Groups
from tests.gallery.painted import network_config, write_checkpoint, write_photos
from tests.media.clips import write_clip
from tests.places import ROOT

VIDEO, ONLY = "in/2024-03-09/c1s1_6.mp4", "in/2024-03-09/c1s1_1.jpg"
# Each of them is what a filter leaves out.
OTHERS = ["out/2024-03-09/c1s1_2.png", "in/2024-03-09/c2s1_3.jpg", "in/2024-03-08/c1s1_4.jpg"]
OTHERS += ["in/2024-03-10/c1s1_5.jpg", VIDEO]
FILTERS = "--folder=photos/in --camera=c1 --camera=x --after=2024-03-09 --before=2024-03-09"
INDEX = "--mode=index --checkpoint=run --gallery=people.lance --source=photos --exclude=drafts"
SEARCH = "--mode=search --checkpoint=run --query=photos/a.jpg --workdir=out"


def launched(words):
    return launch.main(["launch.py", *words.split()])


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """A folder with a checkpoint, photos, and the gallery of these; it is where all is typed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("home"))
        write_checkpoint(Path("run"), network_config())
        write_photos(Path("photos"), ["a.jpg", "drafts/d.jpg", ONLY, *OTHERS[:-1]])
        write_clip(f"photos/{VIDEO}", [number / 4 for number in range(8)])
        shutil.copy("photos/a.jpg", "photos/copy.jpg")
        Path("photos/in/bad.jpg").write_bytes(b"no photo")
        assert launched(INDEX) == 3
        yield


def people_in(gallery, *names):
    """The people of photos and videos."""
    contents = [content_hash(Path("photos", name).read_bytes()) for name in names]
    scenes = [scene.id for one in contents for scene in gallery.memory().scenes_of(one)]
    return gallery.memory().people_of(*scenes)


@pytest.mark.parametrize(
    ("flags", "code", "names"),
    [
        ("--gallery=people.lance", 0, [ONLY, *OTHERS]),
        ("--gallery=photos/in --count=3", 3, [ONLY, *OTHERS[1:]]),
        (f"--gallery=people.lance --kind=photo {FILTERS}", 0, [ONLY]),
        ("--gallery=people.lance --kind=video --box={box}", 0, [VIDEO]),
    ],
)
def test_search(capsys, flags, code, names):
    """A folder is searched as a gallery is, with all below it, videos too."""
    gallery = Gallery.open("people.lance")
    queries, people = people_in(gallery, "a.jpg"), people_in(gallery, *names)
    box = ",".join(map(str, queries[0].box))
    assert launched(f"{SEARCH} {flags}".format(box=box)) == code
    assert "not calibrated" in capsys.readouterr().out
    rankings = json.loads(Path("out/ranking.json").read_text())
    embeddings = gallery.embeddings([one.id for one in people])
    assert len(rankings) == (1 if "box" in flags else len(queries))
    for query, ranking in zip(queries, rankings, strict=False):
        np.testing.assert_allclose(ranking["query"]["box"], query.box, atol=0.01)
        similarity = embeddings @ gallery.embeddings([query.id])[0]
        best = np.argsort(-similarity)[: 3 if "count" in flags else None]
        results, expected = ranking["results"], [people[row] for row in best]
        found = [(one["person"], one["image"], one["second"]) for one in results]
        assert found == [(one.id, one.scene.path, one.scene.second) for one in expected] != []
        found = [one["similarity"] for one in results]
        np.testing.assert_allclose(found, similarity[best], atol=1e-4)
        boxes = [one["box"] for one in results]
        np.testing.assert_allclose(boxes, [one.box for one in expected], atol=0.01)
    assert Path("out/ranking.png").is_file()


def calibrated(folder, *probability):
    """A copy of the checkpoint with a curve for similarities from -1 to 1."""
    similarity, counts = np.linspace(-1, 1, 41), [1] * 41
    known = np.interp(similarity, np.linspace(-1, 1, len(probability)), probability).tolist()
    curve = Calibration("some", 999.0, similarity.tolist(), known, known, counts, counts)
    curve.save(chosen_step(Path(shutil.copytree("run", folder)))[0])
    return curve


def test_results_end_and_groups_begin_where_they_are_likely(tmp_path, capsys):
    curve, answers = calibrated(tmp_path / "own", 0.0, 0.0, 0.9), []
    for switch in ("", "--show_all"):
        words = f"{SEARCH} --gallery=people.lance --checkpoint={tmp_path}/own --json {switch}"
        assert launched(words) == 0
        answers.append(json.loads(capsys.readouterr().out))
        assert answers[-1] == json.loads(Path("out/ranking.json").read_text())
    for some, everybody in zip(*answers, strict=True):
        similarity = np.array([one["similarity"] for one in everybody["results"]])
        probability = np.array([one["probability"] for one in everybody["results"]])
        np.testing.assert_allclose(probability, curve.results(similarity, 9), atol=1e-5)
        assert 0 < (count := (probability >= LIMIT).sum()) < len(probability)
        assert some["results"] == everybody["results"][:count]
    words = f"--mode=group --checkpoint={tmp_path}/own --gallery=people.lance --workdir=out"
    assert launched(f"{words} --json --across_days") == 0
    groups = json.loads(capsys.readouterr().out)
    assert groups == json.loads(Path("out/groups.json").read_text())
    gallery = Gallery.open("people.lance")
    assert [one["id"] for one in groups] == [one.id for one in Groups(gallery.people).all()] != []
    for people in (group["people"] for group in groups):
        scenes = [gallery.memory().person(one["person"]).scene for one in people]
        assert len({scene.id for scene in scenes}) == len(scenes) > 1
        assert [one["image"] for one in people] == [scene.path for scene in scenes]
    calibrated(tmp_path / "nobody", 0.0, 0.001)
    assert launched(f"{SEARCH} --gallery=people.lance --checkpoint={tmp_path}/nobody") == 0
    assert NOBODY in capsys.readouterr().out
    assert not any(one["results"] for one in json.loads(Path("out/ranking.json").read_text()))


def test_export_and_forget(tmp_path, capsys):
    address = shutil.copytree("people.lance", tmp_path / "people.lance")
    assert launched(f"--mode=export --gallery={address} --target={tmp_path}/p.parquet") == 0
    gallery = Gallery.open(address)
    one, *others = [person.id for person in people_in(gallery, ONLY, *OTHERS[:-1])]
    query = gallery.embeddings([one])[0]
    forget = f"--mode=forget --gallery={address} --person={one}"
    assert launched(f"{forget} --photo=photos/{VIDEO} --photo=photos/copy.jpg") == 0
    assert "not reached: pictures and rankings of searches, exports" in capsys.readouterr().out
    assert {match.person.id for match in gallery.search(query, 99)} == {*others}
    assert launched(forget) == launched(f"--mode=forget --gallery={address}") == 2


def test_index_on_a_cluster(tmp_path, capsys, monkeypatch):
    """Workers make the detector that is typed; a copy counts once."""
    pytest.importorskip("ray", reason="the extra cluster is missing: make setup")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of workers, wherever they are
    assert launched(f"{INDEX} --cluster=auto") == 2
    assert "--cluster=auto: found no Ray cluster" in capsys.readouterr().err
    assert launched(f"{INDEX} --gallery={tmp_path}/g --cluster=local") == 3
    assert " in 8 photos and frames" in capsys.readouterr().out
    here, there = (Gallery.open(place).memory() for place in ("people.lance", tmp_path / "g"))
    assert (len(here), here.cards(99)) == (len(there), there.cards(99))


def test_what_cannot_be_is_one_line(capsys):
    for file in ("empty/notes.txt", "bad/bad.jpg", "query.png"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    search = f"{SEARCH} --workdir=none --gallery="
    for words, code, message in (
        (f"{search}empty", 2, "found no photo or video"),
        (f"{search}bad", 3, "files skipped: 1"),
        (f"{search}nothing", 2, "--source: found "),
        (f"{search}people.lance --query=query.png", 2, "query.png: "),
        (f"{search}people.lance --box=500,500,600,600", 2, "nobody was found at 500,500,600,600"),
        (f"{search}people.lance --box=1,2,3", 2, "--box: found '1,2,3'"),
        (f"{INDEX} --every=often", 2, "--every: found 'often', expected a time: 1s"),
        (INDEX, 3, "files skipped: 1 (listed above)"),
        ("--mode=detect --checkpoint=run --source=bad --target=bad.npz", 3, "files skipped: 1"),
    ):
        assert launched(words) == code
        printed = capsys.readouterr()
        assert message in printed.err.splitlines()[-1]
    assert not Path("none").exists()
