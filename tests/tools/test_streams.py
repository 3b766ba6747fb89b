"""Video files with several streams, odd times or several files: the right stream, times and file."""

from fractions import Fraction
from pathlib import Path

import av
import pytest
from av.stream import Disposition

from tests.tools.test_pack import encoded, pixels, rows_of, write
from tests.tools.test_pack_videos import (
    load,
    make,
    mux_jpeg,
    number_of,
    numbered,
    pack_tree,
    shown,
    tree,
)
from tools.folders import VIDEOS, find_sources

SMALL, LARGE = (112, 64), (224, 128)


def with_streams(path: Path, *streams: tuple[tuple[int, int], int, Disposition], seconds: float = 1) -> Path:
    """A video of MPEG-4 streams, each (size, number of its first frame, disposition), 10 frames a second."""
    with av.open(str(path), "w") as container:
        added = [container.add_stream("mpeg4", rate=10) for _ in streams]
        for stream, (size, _, disposition) in zip(added, streams, strict=True):
            (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
            stream.disposition = disposition
        for n in range(round(10 * seconds)):
            for stream, (size, first, _) in zip(added, streams, strict=True):
                container.mux(stream.encode(av.VideoFrame.from_image(numbered(first + n, size))))
        for stream in added:
            container.mux(stream.encode())
    return path


NONE, DEFAULT = Disposition(0), Disposition.default


@pytest.mark.parametrize(
    ("streams", "wanted"),
    [
        ([(SMALL, 50, NONE), (LARGE, 0, NONE)], LARGE),  # a preview comes first
        ([(LARGE, 50, NONE), (SMALL, 0, DEFAULT)], SMALL),
        ([(LARGE, 0, DEFAULT), (SMALL, 50, DEFAULT)], LARGE),
        ([(SMALL, 0, NONE), (SMALL, 50, NONE)], SMALL),  # of equals, the first
    ],
)
def test_the_default_stream_is_packed_or_else_the_largest(tmp_path, streams, wanted):
    """Regression: the first stream was packed, which may be a preview."""
    packed = load(with_streams(tmp_path / "a.mkv", *streams), fps=10.0)
    assert packed.size == wanted and [number_of(jpeg) for jpeg in packed.frames] == [*range(10)]


def test_a_cover_picture_without_its_flag_is_not_the_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", rate=30)
        cover.width, cover.height, cover.pix_fmt = 400, 300, "yuvj420p"
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 112, 64, "yuv420p"
        container.start_encoding()
        mux_jpeg(container, cover, encoded(pixels(1, (400, 300))))
        for n in range(5):
            container.mux(stream.encode(av.VideoFrame.from_image(numbered(n))))
        container.mux(stream.encode())
    assert [number_of(jpeg) for jpeg in load(tmp_path / "a.mp4").frames] == [*range(5)]


def test_the_sound_may_be_longer_than_the_video(tmp_path):
    """Regression: the duration of the file was taken for that of the video, which was then rejected."""
    with av.open(str(tmp_path / "a.flv"), "w") as container:
        stream = container.add_stream("flv", rate=10)
        stream.width, stream.height, stream.pix_fmt = 112, 64, "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono")
        for n in range(10):
            container.mux(stream.encode(av.VideoFrame.from_image(numbered(n))))
        container.mux(stream.encode())
        for n in range(50):
            noise = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            noise.planes[0].update(bytes(4096))
            noise.sample_rate, noise.pts = 16000, 1024 * n
            container.mux(sound.encode(noise))
        container.mux(sound.encode())
    packed = load(tmp_path / "a.flv", fps=10.0)
    assert [number_of(jpeg) for jpeg in packed.frames] == [*range(10)] and packed.change == "flv to JPEG"


# ---- times -----------------------------------------------------------------------------------------------


def vops(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def packed_avi(path: Path, count: int, rate: int, in_a_row: int) -> Path:
    """An AVI with packed B-frames, as XviD writes it: a P-frame shares a packet with the first B-frame.

    An empty picture fills the packet that is left over.
    """
    plain = vops(
        make(
            path.with_name("plain.avi"),
            [numbered(n) for n in range(count)],
            "mpeg4",
            rate,
            bf=str(in_a_row),
            g="600",
            b_strategy="0",
        )
    )
    start, note = plain[0].index(b"\0\0\1\xb2"), plain[0].index(b"\0\0\1\xb6")
    packets = [plain[0][:start] + b"\0\0\1\xb2DivX503b1393p" + plain[0][note:]]
    for n in range(1, count, in_a_row + 1):
        group = plain[n : n + in_a_row + 1]
        packets += [b"".join(group[:2]), *group[2:], b"\0\0\1\xb6\x40\0\0"][: len(group)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 112, 64, "yuv420p"
        stream.codec_context.codec_tag = "XVID"
        container.start_encoding()
        for n, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, n, n, Fraction(1, rate)
            packet.is_keyframe = n == 0
            container.mux(packet)
    return path


@pytest.mark.parametrize(("rate", "in_a_row", "count"), [(25, 1, 51), (30, 1, 31), (25, 2, 52)])
def test_packed_b_frames_in_avi_are_not_late(tmp_path, rate, in_a_row, count):
    """Regression: all frames but the first came one frame late."""
    path = packed_avi(tmp_path / "a.avi", count, rate, in_a_row)
    found = [number_of(jpeg) for jpeg in load(path).frames]
    wanted = shown([Fraction(n, rate) for n in range(count)], round(count * 30 / rate))
    assert found[: len(wanted) - 1] == wanted[:-1] and found[-1] == count - 1


# ---- what the pictures look like -------------------------------------------------------------------------


@pytest.mark.parametrize(("transfer", "note"), [(16, "HDR (PQ)"), (18, "HDR (HLG)"), (1, "")])
def test_hdr_is_reported(tmp_path, transfer, note):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.width, stream.height, stream.pix_fmt = 112, 64, "yuv420p10le"
        stream.codec_context.color_trc = transfer
        container.mux(stream.encode(av.VideoFrame.from_image(numbered(1)).reformat(format="yuv420p10le")))
        container.mux(stream.encode())
    packed = load(tmp_path / "a.mkv")
    assert packed.change == "ffv1 to JPEG" + (f", {note} without tone mapping" if note else "")


def test_a_change_of_size_within_a_stream_is_reported(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = *SMALL, "yuvj420p"
        container.start_encoding()
        for n in range(10):
            mux_jpeg(container, stream, encoded(numbered(n, LARGE if n >= 5 else SMALL)), n)
    packed = load(tmp_path / "a.mkv")
    assert [number_of(jpeg) for jpeg in packed.frames] == [*range(10)]
    assert packed.size == SMALL and packed.change == "mjpeg to JPEG, resized, frames of several sizes"


# ---- several files ---------------------------------------------------------------------------------------


def test_a_video_is_listed_without_its_sidecar(tmp_path):
    """Regression: .json was preferred to suffixes that the list of videos lacked."""
    names = [f"x{suffix}" for suffix in (".TS", ".m1v", ".m2ts", ".mpeg", ".ogv", ".ts", ".vob")]
    for name in [*names, "x.json"]:
        write(tmp_path / name, b"")
    assert find_sources(tmp_path, VIDEOS).sources == names


def test_of_two_files_of_one_video_the_good_one_is_packed(tmp_path):
    """Regression: the video was rejected although its other file is good."""
    names = {
        "train": ["train/id0x_000007_000017.mp4", "train/id1x_000007_000017.mp4"],
        "val": ["valx_7_17.mp4"],
    }
    source = tree(tmp_path / "source", names)
    for number in (0, 1):
        write(source / f"train/id{number}x_000007_000017.avi", b"<html>404</html>")
    (source / "replacement").mkdir()
    (source / names["train"][1]).rename(source / "replacement/id1x_000007_000017.mkv")
    write(source / "train/id1x_000007_000017.mp4", bytes(1000))
    assert pack_tree(source, tmp_path / "out") == 0
    assert {row["source"]: row["status"] for row in rows_of(tmp_path / "out")} == {
        "train/id0x_000007_000017.mp4": "ok",
        "replacement/id1x_000007_000017.mkv": "ok",
    }
    (source / "replacement/id1x_000007_000017.mkv").write_bytes(b"")
    assert pack_tree(source, tmp_path / "bad") == 1
    (bad,) = [row for row in rows_of(tmp_path / "bad") if row["status"] != "ok"]
    assert bad["source"] == "train/id1x_000007_000017.avi", "the file that comes first"
