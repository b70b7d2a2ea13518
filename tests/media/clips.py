"""Videos whose frames show their number, made by PyAV."""

from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition

SIZE = (96, 128)


def numbered(number):
    """A frame with a red upper left corner and its number in eight blocks, RGB."""
    image = np.full((*SIZE, 3), 60, np.uint8)
    image[:16, :16] = 255, 0, 0
    for bit in range(8):
        image[40:72, 16 * bit : 16 * bit + 16] = 255 * (number >> bit & 1)
    return image


def number_of(image):
    return sum(int(image[56, 16 * bit + 8].mean() > 128) << bit for bit in range(8))


def write_clip(path, times, codec="libx264", muxing=None, cover=False, tags=None, **options):
    """A video whose frame `n` is shown at `times[n]` seconds."""
    with av.open(str(path), "w", options=muxing or {}) as container:
        container.metadata.update(tags or {})
        stream = container.add_stream(codec, rate=30, options={"g": "15", **options})
        stream.width, stream.height = SIZE[::-1]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        base = Fraction(1, 25 if codec in ("mpeg4", "mpeg2video") else 600)
        stream.codec_context.time_base = base
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = *SIZE, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            blue = av.VideoFrame.from_ndarray(np.full((*SIZE[::-1], 3), (0, 0, 255), np.uint8))
            container.mux([*picture.encode(blue), *picture.encode()])
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = round(time / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
