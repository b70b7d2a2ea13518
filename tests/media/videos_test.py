"""The frame that is searched is the frame at its own time stamp, and is found again exactly."""

import struct
import time

import numpy as np
import pytest

from alignps_jax.errors import UserError
from alignps_jax.media import frames, read_photo
from tests.media.clips import number_of, numbered, write_clip
from tests.places import SHARED

MOST = 10**7
STEADY = [number / 25 for number in range(100)]
# 30 frames a second, then 12, then nothing for 3 s, then 24.
VARIABLE = [n / 30 for n in range(40)] + [4 / 3 + n / 12 for n in range(20)]
VARIABLE += [6 + n / 24 for n in range(30)]
CLIPS = {
    "steady.mp4": (STEADY, {}),
    "variable.mp4": (VARIABLE, {}),
    "variable.mkv": (VARIABLE, {}),
    "open_gop.mkv": (VARIABLE, {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
    "cut.mkv": (STEADY, {}),
    "no_index.mkv": (STEADY, {"muxing": {"live": "1"}}),
    "later.mkv": ([5 + second for second in STEADY], {}),
    "later.mp4": ([5 + second for second in STEADY], {}),
    "stream.ts": (STEADY, {}),
    "stream.mpg": (STEADY, {"codec": "mpeg2video", "bf": "2"}),
    "old.avi": (STEADY, {"codec": "mpeg4", "bf": "2"}),
    "web.webm": (VARIABLE, {"codec": "libvpx-vp9"}),
    "av1.mp4": (STEADY, {"codec": "libsvtav1", "svtav1-params": "lp=1"}),
    "hevc.ts": (STEADY, {"codec": "libx265", "x265-params": "keyint=12:log-level=none"}),
    "motion.mov": (STEADY, {"codec": "mjpeg"}),
    "cover.mp4": (STEADY, {"cover": True}),
}


def seen(path, every=0.5, after=-1):
    return [(second, image) for second, image, _ in frames(str(path), every, MOST, after)]


@pytest.mark.parametrize("name", CLIPS)
def test_frames_of_every_container(tmp_path, name):
    times, options = CLIPS[name]
    # AVI keeps no time stamps: where frames are coded in another order, all come one later.
    times = np.array(times) - times[0] + (0.04 if name == "old.avi" else 0)
    path = write_clip(tmp_path / name, CLIPS[name][0], **options)
    if name == "cut.mkv":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found = seen(path)
    _, first = np.unique(np.floor((times + 1e-4) / 0.5), return_index=True)
    if name == "cut.mkv":  # it is done when its stream ends
        assert 2 < len(found) < 8
        first = first[: len(found)]
    assert [number_of(image) for _, image in found] == first.tolist()
    np.testing.assert_allclose([second for second, _ in found], times[first], atol=1e-3)
    for position, (second, image) in enumerate(found):
        np.testing.assert_array_equal(read_photo(path, MOST, at=second), image)
        assert image.flags.writeable
        assert [s for s, _ in seen(path, after=second)] == [s for s, _ in found[position + 1 :]]
    with pytest.raises(UserError, match=r"found no frame at 0\.010 s"):
        read_photo(path, MOST, at=0.01)


@pytest.mark.parametrize(("turn", "quarters"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2)])
def test_frames_are_upright(tmp_path, turn, quarters):
    """As a phone stores them that is held upright or upside down: 9.3.2 of ISO 14496-12."""
    path, turns = write_clip(tmp_path / "phone.mp4", [0, 0.1]), ((1, 0, 0, 1), turn)
    old, new = (struct.pack(">5i", *(n << 16 for n in (a, b, 0, c, d))) for a, b, c, d in turns)
    begin, header, rest = path.read_bytes().partition(b"tkhd")
    path.write_bytes(begin + header + rest.replace(old, new, 1))
    ((_, image),) = seen(path)
    np.testing.assert_allclose(image, np.rot90(numbered(0), quarters), atol=30)


def test_to_go_on_behind_a_second_decodes_little(tmp_path):
    path = write_clip(tmp_path / "long.mp4", [n / 30 for n in range(3000)])
    begin = time.process_time()
    last = seen(path, 1.0)[-2][0]
    middle = time.process_time()
    assert len(seen(path, 1.0, last)) == 1
    assert time.process_time() - middle < 0.3 * (middle - begin)


def test_what_is_no_video_that_can_be_decoded(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", STEADY)
    whole, end = clip.read_bytes(), clip.read_bytes().index(b"moov") - 4
    for name, data in {
        "list.mp4": b"ffconcat version 1.0\nfile 'clip.mp4'\n",
        "list.ts": b"#EXTM3U\n#EXTINF:4,\nclip.mp4\n#EXT-X-ENDLIST\n",
        "cut.mp4": whole[: len(whole) // 2],
        "empty.mp4": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: .*Invalid"):
            read_photo(tmp_path / name, MOST, at=0.0)
    with pytest.raises(UserError, match=r"clip.mp4: found 128x96 pixels"):
        read_photo(clip, 128 * 96 - 1, at=0.0)
    clip.write_bytes(whole[:48] + b"\xff" * (end - 48) + whole[end:])
    with pytest.raises(UserError, match=r"found no frame that can be decoded \(h264\)"):
        read_photo(clip, MOST, at=0.0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real videos are here")
@pytest.mark.parametrize("name", ["ntsc", "slowmo", "start5", "trim"])
def test_real_videos(name):
    found = seen(SHARED / "odd" / f"{name}.mp4", 1.0)
    assert found[0][0] == 0
    for second, image in found[:: len(found) // 2]:
        np.testing.assert_array_equal(
            read_photo(SHARED / "odd" / f"{name}.mp4", MOST, at=second), image
        )
