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
        stream.codec_context.time_base = base = Fraction(1, 600)
        if codec in ("mpeg4", "mpeg2video"):
            stream.codec_context.time_base = base = Fraction(1, 25)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            blue = av.VideoFrame.from_ndarray(np.full((48, 64, 3), (0, 0, 255), np.uint8))
            for packet in (*picture.encode(blue), *picture.encode()):
                container.mux(packet)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = round(time / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def trim(source, path, begin):
    """The same from a second on, without encoding anew: what comes before it is hidden."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        old.seek(int(begin * av.time_base))
        shift = round(begin / old.streams.video[0].time_base)
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = (
                    packet.pts - shift,
                    packet.dts - shift,
                    stream,
                )
                new.mux(packet)
    return path
