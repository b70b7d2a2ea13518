"""The frame that is searched is the frame at its own time stamp, and is found again exactly."""

import time

import av
import numpy as np
import PIL.Image
import pytest

from alignps_jax.errors import UserError
from alignps_jax.media.videos import frame_at, frames
from tests.media.clips import SIZE, number_of, numbered, trim, write_clip
from tests.places import SHARED

MOST = 10**6
STEADY = [number / 25 for number in range(100)]
# 30 frames a second, then 12, then nothing for 3 s, then 24.
VARIABLE = [n / 30 for n in range(40)] + [4 / 3 + n / 12 for n in range(20)]
VARIABLE += [6 + n / 24 for n in range(30)]
LATER = [5 + second for second in STEADY]
AV1 = {"codec": "libsvtav1", "svtav1-params": "lp=1"}
CLIPS = {
    "steady.mp4": (STEADY, {}),
    "variable.mp4": (VARIABLE, {}),
    "variable.mkv": (VARIABLE, {}),
    "open_gop.mkv": (VARIABLE, {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
    "no_index.mkv": (STEADY, {"muxing": {"live": "1"}}),
    "later.mkv": (LATER, {}),
    "later.mp4": (LATER, {}),
    "stream.ts": (STEADY, {}),
    "stream.mpg": (STEADY, {"codec": "mpeg2video", "bf": "2"}),
    "old.avi": (STEADY, {"codec": "mpeg4", "bf": "2"}),
    "web.webm": (VARIABLE, {"codec": "libvpx-vp9"}),
    "av1.mp4": (STEADY, AV1),
    "hevc.ts": (STEADY, {"codec": "libx265", "x265-params": "keyint=12:log-level=none"}),
    "motion.mov": (STEADY, {"codec": "mjpeg"}),
    "cover.mp4": (STEADY, {"cover": True}),
}


def first_at_each(times, every, begin):
    """(second, number) of the first frame at or after each multiple of `every`, counted once."""
    found, due = [], -1.0
    for number, second in enumerate(round(t - times[0] + begin, 6) for t in times):
        if second >= due - 1e-4:
            found.append((second, number))
            due = (second + 1e-4) // every * every + every
    return found


@pytest.mark.parametrize("name", CLIPS)
def test_frames_of_every_container(tmp_path, name):
    times, options = CLIPS[name]
    path = str(write_clip(tmp_path / name, times, **options))
    found = list(frames(path, 0.5, MOST))
    # AVI keeps no time stamps: where frames are coded in another order, all come one later.
    expected = first_at_each(times, 0.5, 0.04 if name == "old.avi" else 0.0)
    assert [number_of(image) for _, image in found] == [number for _, number in expected]
    np.testing.assert_allclose([s for s, _ in found], [s for s, _ in expected], atol=1e-3)
    for position, (second, image) in enumerate(found):
        np.testing.assert_array_equal(frame_at(path, second, MOST), image)
        assert image.flags.writeable
        following = [s for s, _ in frames(path, 0.5, MOST, after=second)]
        assert following == [s for s, _ in found[position + 1 :]]
    with pytest.raises(UserError, match=r"found no frame at 0\.010 s"):
        frame_at(path, 0.01, MOST)


def test_a_clip_that_was_trimmed_without_encoding(tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", STEADY)
    path = str(trim(whole, tmp_path / "trimmed.mp4", 1.32))
    found = list(frames(path, 0.5, MOST))
    assert [number_of(image) for _, image in found] == [33, 46, 58, 71, 83, 96]
    for second, image in found:
        np.testing.assert_array_equal(frame_at(path, second, MOST), image)


@pytest.mark.parametrize(("turn", "quarters"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2)])
def test_frames_are_upright(tmp_path, turn, quarters):
    """As a phone stores them that is held upright or upside down: 9.3.2 of ISO 14496-12."""
    path = write_clip(tmp_path / "phone.mp4", [0, 0.1])
    data = path.read_bytes()
    one = (1 << 16).to_bytes(4, "big")
    straight = one + bytes(12) + one
    a, b, c, d = ((value << 16).to_bytes(4, "big", signed=True) for value in turn)
    assert straight in data[data.index(b"tkhd") :]
    header = data.index(straight, data.index(b"tkhd"))
    turned = a + b + bytes(4) + c + d
    path.write_bytes(data[:header] + turned + data[header + len(turned) :])
    ((_, image),) = frames(str(path), 1.0, MOST)
    expected = np.rot90(numbered(0), quarters)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 5


def test_to_go_on_behind_a_second_decodes_little(tmp_path):
    path = str(write_clip(tmp_path / "long.mp4", [n / 30 for n in range(3000)]))
    begin = time.process_time()
    last = [second for second, _ in frames(path, 1.0, MOST)][-2]
    middle = time.process_time()
    assert len(list(frames(path, 1.0, MOST, after=last))) == 1
    assert time.process_time() - middle < 0.3 * (middle - begin)


def test_a_video_is_done_when_its_stream_ends(tmp_path):
    path = write_clip(tmp_path / "cut.mkv", STEADY)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    found = [number_of(image) for _, image in frames(str(path), 0.5, MOST)]
    assert found == [0, 13, 25, 38, 50, 63, 75, 88][: len(found)]
    assert 2 < len(found) < 8


def test_what_is_no_video_that_can_be_decoded(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", STEADY)
    PIL.Image.new("RGB", SIZE).save(tmp_path / "photo.gif")
    whole, damaged = clip.read_bytes(), tmp_path / "damaged.mkv"
    with av.open(str(clip)) as good, av.open(str(damaged), "w") as bad:
        stream = bad.add_stream_from_template(good.streams.video[0])
        for number in range(20):
            packet = av.Packet(np.random.default_rng(number).bytes(500))
            packet.stream, packet.pts, packet.dts = stream, number * 512, number * 512
            bad.mux(packet)
    files = {
        "list.mp4": (b"ffconcat version 1.0\nfile 'clip.mp4'\n", "expected a video"),
        "list.ts": (b"#EXTM3U\n#EXTINF:4,\nclip.mp4\n#EXT-X-ENDLIST\n", "expected a video"),
        "photo.mp4": ((tmp_path / "photo.gif").read_bytes(), "expected a video"),
        "cut.mp4": (whole[: len(whole) // 2], "expected a video"),
        "empty.mp4": (b"", "expected a video"),
        "random.mkv": (damaged.read_bytes(), r"no frame that can be decoded \(h264\)"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}: .*{message}"):
            frame_at(str(tmp_path / name), 0.0, MOST)
    with pytest.raises(UserError, match=r"clip.mp4: found 128x96 pixels"):
        frame_at(str(clip), 0.0, 128 * 96 - 1)
    with pytest.raises(FileNotFoundError):
        frame_at(str(tmp_path / "gone.mp4"), 0.0, MOST)


@pytest.mark.skipif(not (SHARED / "odd").is_dir(), reason="no real videos are here")
def test_real_videos():
    for path in sorted((SHARED / "odd").glob("*.mp4")):
        found = list(frames(str(path), 1.0, 10**7))
        assert found[0][0] == 0
        for second, image in found[:: len(found) // 2]:
            np.testing.assert_array_equal(frame_at(str(path), second, 10**7), image)
