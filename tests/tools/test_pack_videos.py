"""Packing video files: the right frames at the right times, upright; damage is named and never packed."""

import io
import os
import wave
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image, ImageOps

from pipelines.errors import UserError
from tests.tools.test_pack import ROOT, dali_decode, encoded, exif, frames_of, pixels, rows_of, sums, write
from tools.folders import FRAMES, VIDEOS
from tools.images import BadImage, Packed
from tools.pack import ClipOptions, ListOptions, pack_all, pack_clips
from tools.packing import run
from tools.samples import list_samples
from tools.shards import Packing, PackPlan, Sample, VideoPacking
from tools.verify import verify
from tools.videos import load_video, on_grid

BITS = 7
PACKING = VideoPacking(256, 4, 1_000_000, 0.0, "", 30.0, 60.0, 10.0, 30.0, "")


def numbered(number: int, size: tuple[int, int] = (BITS * 16, 64)) -> Image.Image:
    """A picture that says its number in bars, black for 0 and white for 1, which no codec blurs away."""
    bars = np.array([[255 * (number >> bit & 1) for bit in range(BITS)]], np.uint8)
    return Image.fromarray(bars).convert("RGB").resize(size, Image.Resampling.NEAREST)


def number_of(jpeg: bytes) -> int:
    bars = np.asarray(Image.open(io.BytesIO(jpeg)).convert("L").resize((BITS, 1), Image.Resampling.BOX))
    return sum(int(bar > 127) << bit for bit, bar in enumerate(bars[0]))


def make(
    path: Path,
    pictures: list[Image.Image],
    codec: str = "mpeg4",
    rate: int = 30,
    pixel_format: str = "yuv420p",
    times: list[Fraction] | None = None,
    turned: dict | None = None,
    **options: str,
) -> Path:
    """A video of `pictures` at `rate` a second or at `times`; its container follows the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *pictures[0].size, pixel_format
        stream.thread_count = 1
        if turned:
            stream.set_display_rotation(**turned)
        base = Fraction(1, 1000 if times else rate)
        stream.codec_context.time_base = base
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = int(times[index] / base) if times else index, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def mux_jpeg(container, stream, jpeg: bytes, time: int = 0) -> None:
    packet = av.Packet(jpeg)
    packet.stream, packet.pts, packet.dts, packet.time_base = stream, time, time, Fraction(1, 30)
    container.mux(packet)


def load(path: Path, **settings) -> Packed:
    (packed,) = load_video(path.parent, path.name, replace(PACKING, **settings))
    return packed


def reason(path: Path, **options) -> str:
    with pytest.raises(BadImage) as caught:
        load(path, **options)
    return str(caught.value)


def tree(root: Path, videos: dict[str, list[str]]) -> Path:
    """Short videos at {split: [path below root, ...]} of label "a b" and annotations that name them."""
    for split, names in videos.items():
        lines = ["label,youtube_id,time_start,time_end,split,is_cc"]
        for number, name in enumerate(names):
            make(root / name, [numbered(50 * (split == "val") + 8 * number + frame) for frame in range(4)])
            lines.append(f"a b,{Path(name).name[:4]},7,17,{split},0")
        write(root / "annotations" / f"{split}.csv", "\n".join([*lines, ""]).encode())
    return root


def pack_tree(root: Path, out: Path, **options) -> int:
    all_options = ClipOptions(**{"workers": 1, "shard_size": 3, **options})
    return pack_clips(root / "annotations", out, all_options, videos=root)


# ---- which frames ----------------------------------------------------------------------------------------


def shown(times: list[Fraction], ticks: int) -> list[int]:
    """At 30 ticks a second the last frame, or the next if nearer and less than half a tick away."""
    found = []
    for now in (Fraction(tick, 30) for tick in range(ticks)):
        last = max(n for n, time in enumerate(times) if time <= now)
        ahead = times[last + 1] - now if last + 1 < len(times) else 1
        found.append(last + (ahead < min(now - times[last], Fraction(1, 60))))
    return found


@pytest.mark.parametrize(
    ("name", "codec", "rate", "pixel_format"),
    [
        ("a.mp4", "libx264", 25, "yuv420p"),
        ("a.avi", "mpeg4", 60, "yuv420p"),
        ("a.mkv", "mjpeg", 30, "yuvj420p"),  # times in whole milliseconds
        ("a.webm", "libvpx-vp9", 24, "yuv420p"),
        ("a.gif", "gif", 20, "rgb8"),
        ("a.wmv", "wmv2", 15, "yuv420p"),
        ("a.ts", "mpeg2video", 50, "yuv420p"),  # times that do not begin at 0
        ("a.flv", "flv", 30, "yuv420p"),  # no length for its last frame
    ],
)
def test_any_frame_rate_is_sampled_at_30_by_time(tmp_path, name, codec, rate, pixel_format):
    path = make(tmp_path / name, [numbered(n) for n in range(2 * rate)], codec, rate, pixel_format)
    packed = load(path)
    assert [number_of(jpeg) for jpeg in packed.frames] == shown(
        [Fraction(n, rate) for n in range(2 * rate)], 60
    )
    assert packed.change.endswith(" to JPEG") and packed.size == (112, 64)
    assert len(load(path, fps=7.5).frames) == 15


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_varying_frame_rates_keep_their_speed(tmp_path, name):
    times = [Fraction(ms, 1000) for ms in (0, 40, 300, 320, 340, 1000, 1050, 2000)]
    path = make(tmp_path / name, [numbered(n) for n in range(8)], "libx264", times=times, bf="0")
    found = [number_of(jpeg) for jpeg in load(path).frames]
    assert found[:61] == shown(times, 61) and set(found[61:]) <= {7}


@pytest.mark.parametrize("rate", [25, 30])
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("1.m2v", "mpeg2video", {}),
        ("1.m1v", "mpeg1video", {"bf": "2"}),
        ("1.mpg", "mpeg1video", {"bf": "2"}),
        ("1.h264", "libx264", {}),
        ("1.hevc", "libx265", {"x265-params": "log-level=none"}),
    ],
)
def test_streams_without_a_container_have_a_constant_rate(tmp_path, name, codec, rate, options):
    path = make(tmp_path / name, [numbered(n) for n in range(30)], codec, rate, **options)
    clip = load(path)
    expected = shown([Fraction(n, rate) for n in range(30)], 30 * 30 // rate)
    assert [number_of(jpeg) for jpeg in clip.frames] == expected
    assert clip.change == f"{codec.removeprefix('lib').replace('x26', 'h26').replace('h265', 'hevc')} to JPEG"


def test_on_grid():
    def taken(starts: list[float], fps: int, last: float) -> list[int]:
        ends = [*starts[1:], starts[-1] + last]
        spans = zip(starts, ends, strict=True)
        timed = [(Fraction(a), Fraction(b - a), number) for number, (a, b) in enumerate(spans)]
        return list(on_grid(timed, Fraction(fps)))

    assert taken([0, 1, 2], 1, 1) == [0, 1, 2]
    assert taken([0, 1, 2], 2, 1) == [0, 0, 1, 1, 2, 2], "of two as near the earlier one"
    assert taken([0, 0.25, 0.5, 0.75], 2, 0.25) == [0, 2]
    assert taken([0, 4], 1, 1) == [0, 0, 0, 0, 1], "what stands long is shown until the next comes"
    assert taken([0], 30, 0.001) == [0], "a clip is never empty"
    assert list(on_grid([], Fraction(30))) == []


def test_times_that_run_backwards_advance_by_one_frame(tmp_path):
    with av.open(str(tmp_path / "a.ts"), "w") as container:
        stream = container.add_stream("mpeg2video", rate=30)
        stream.width, stream.height, stream.pix_fmt = 112, 64, "yuv420p"
        for number in range(20):
            frame = av.VideoFrame.from_image(numbered(number))
            for packet in stream.encode(frame):
                packet.pts = packet.dts = number % 10
                container.mux(packet) if number < 10 else None
    good = load(tmp_path / "a.ts").frames
    data = (tmp_path / "a.ts").read_bytes()
    (tmp_path / "twice.ts").write_bytes(data + data)
    found = [number_of(jpeg) for jpeg in load(tmp_path / "twice.ts").frames]
    assert found == 2 * [number_of(jpeg) for jpeg in good]


# ---- what they look like ---------------------------------------------------------------------------------


def distance(jpeg: bytes, picture: Image.Image) -> float:
    """Mean difference of the pixels, 0 to 255, as training will decode them."""
    found = dali_decode([jpeg])[0]
    assert found.shape == (picture.height, picture.width, 3)
    return float(np.abs(found.astype(int) - np.asarray(picture)).mean())


@pytest.mark.parametrize(
    ("turned", "wanted"),
    [
        ({"degrees": 90}, lambda picture: picture.transpose(Image.Transpose.ROTATE_90)),
        ({"degrees": 180}, lambda picture: picture.transpose(Image.Transpose.ROTATE_180)),
        ({"degrees": -90}, lambda picture: picture.transpose(Image.Transpose.ROTATE_270)),
        ({"degrees": 0, "hflip": True}, ImageOps.mirror),
        ({"degrees": 0, "vflip": True}, ImageOps.flip),
        ({"degrees": 90, "hflip": True}, lambda picture: ImageOps.mirror(picture.rotate(90, expand=True))),
        ({"degrees": 90, "vflip": True}, lambda picture: ImageOps.flip(picture.rotate(90, expand=True))),
    ],
)
def test_display_matrices_are_applied(tmp_path, turned, wanted):
    picture = pixels(1, (160, 96))
    packed = load(make(tmp_path / "a.mp4", [picture] * 3, turned=turned, qscale="2"))
    assert packed.change == "mpeg4 to JPEG, turned upright"
    assert distance(packed.frames[0], wanted(picture)) < 4
    assert packed.size == wanted(picture).size


def test_motion_jpegs_turned_by_exif_are_turned(tmp_path):
    picture = pixels(1, (160, 96))
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuvj420p"
        container.start_encoding()
        mux_jpeg(container, stream, encoded(picture, exif=exif(6)))
    packed = load(tmp_path / "a.mkv")
    assert distance(packed.frames[0], picture.rotate(-90, expand=True)) < 4


@pytest.mark.parametrize("matrix", [None, av.video.reformatter.Colorspace.ITU709])
def test_colors_are_those_of_the_source(tmp_path, matrix):
    picture = pixels(2, (320, 240))
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        if matrix is not None:
            stream.codec_context.colorspace = matrix
        frame = av.VideoFrame.from_image(picture)
        container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=matrix)))
        container.mux(stream.encode())
    assert distance(load(tmp_path / "a.mp4").frames[0], picture) < 1.3


@pytest.mark.parametrize(
    ("size", "wanted"), [((97, 61), (97, 61)), ((301, 400), (100, 133)), ((3, 500), (3, 500))]
)
def test_odd_sizes_are_kept_and_large_ones_scaled(tmp_path, size, wanted):
    picture = pixels(3, size).convert("L").convert("RGB")
    path = make(tmp_path / "a.mkv", [picture] * 2, "ffv1", pixel_format="bgr0")
    packed = load(path, short_side=100)
    assert packed.size == wanted
    assert ("resized" in packed.change) == (size != wanted)
    assert distance(packed.frames[0], picture.resize(wanted, Image.Resampling.BICUBIC)) < 4


def test_fine_stripes_scale_to_gray(tmp_path):
    stripes = np.zeros((300, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    path = make(tmp_path / "a.mkv", [Image.fromarray(stripes)], "ffv1", pixel_format="bgr0")
    found = dali_decode(load(path, short_side=90).frames[:1])[0]
    assert found.shape == (90, 120, 3) and np.abs(found[:, 2:-2].astype(int) - 127).max() < 12


def test_other_streams_are_skipped(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        container.metadata["title"] = "a title"
        sound = container.add_stream("aac", rate=16000, layout="mono")
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 112, 64, "yuv420p"
        for number in range(6):
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            noise.sample_rate, noise.pts = 16000, 1024 * number
            container.mux(sound.encode(noise))
            container.mux(stream.encode(av.VideoFrame.from_image(numbered(number))))
        container.mux([*stream.encode(), *sound.encode()])
    data = (tmp_path / "a.mkv").read_bytes()
    assert b"a title" in data
    (tmp_path / "a.mkv").write_bytes(data.replace(b"a title", b"\xff\xfe\xfd 90s"))  # not in Unicode
    assert [number_of(jpeg) for jpeg in load(tmp_path / "a.mkv").frames] == list(range(6))


# ---- damage ----------------------------------------------------------------------------------------------


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    short = path.with_name(f"cut{path.suffix}")
    short.write_bytes(data[: int(share * len(data))])
    return short


LOST = ("damaged part left out", "shorter than it declares")
HOPELESS = ("less than half of its declared duration can be decoded", "damaged: no frame can be decoded")


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mkv", "mpeg4", {}),
        ("a.avi", "mjpeg", {"pixel_format": "yuvj420p"}),
        ("a.mp4", "libx264", {"bf": "2", "g": "10"}),
        ("a.mov", "libx264", {"bf": "2", "g": "100"}),
        ("a.webm", "libvpx", {"deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_truncated_clips_keep_what_comes_before(tmp_path, name, codec, options):
    path = make(tmp_path / name, [pixels(n, (112, 64)) for n in range(40)], codec, **options)
    whole = load(path)
    assert len(whole.frames) == 40 and "," not in whole.change
    if codec == "libx264":  # without its index, which is its end, such a file is nothing
        assert reason(cut(path, 0.9)) == "not a video, or its header is damaged or missing"
        assert reason(damaged(path, range(12, 40), zeros)) in HOPELESS
    else:
        assert reason(cut(path, 0.3)) in HOPELESS
    packed = load(damaged(path, range(30, 40), zeros) if codec == "libx264" else cut(path, 0.8))
    assert 20 <= len(packed.frames) <= 36
    assert packed.change in [f"{whole.change}, {lost}" for lost in LOST]
    kept = range(40) if codec != "libx264" else sorted(order(path)[:30])
    assert list(dict.fromkeys(packed.frames)) == [whole.frames[n] for n in kept][: len(set(packed.frames))]
    assert codec != "libx264" or len(set(packed.frames)) == 30, "also those the decoder held back"


def order(path: Path) -> list[int]:
    """The frame number of each packet of a 30 fps video, in the order of the file."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return [round(packet.pts * packet.time_base * 30) for packet in packets]


def damaged(path: Path, which: range, damage: Callable[[bytes], bytes]) -> Path:
    """A copy of a video with those packets damaged, counted in the order of the file."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    end = 0
    for number, packet in enumerate(packets):
        place = data.index(bytes(packet), end)
        end = place + packet.size
        if number in which:
            data[place:end] = damage(bytes(packet))
    copy = path.with_name(f"damaged{path.suffix}")
    copy.write_bytes(data)
    return copy


def zeros(packet: bytes) -> bytes:
    return bytes(len(packet))


def test_a_frame_that_the_decoder_concealed_is_not_packed(tmp_path):
    path = make(tmp_path / "a.avi", [pixels(n, (112, 64)) for n in range(20)])

    def bent(packet: bytes) -> bytes:
        return packet[: len(packet) // 2] + bytes(byte ^ 0x55 for byte in packet[len(packet) // 2 :])

    packed = load(damaged(path, range(15, 16), bent))
    assert packed.change == "mpeg4 to JPEG, damaged part left out"
    assert packed.frames == load(path).frames[:15]
    assert reason(damaged(path, range(5, 6), bent)) == HOPELESS[0]


def test_undecodable_frames_at_the_start_are_left_out(tmp_path):
    path = make(
        tmp_path / "a.webm", [numbered(n) for n in range(40)], "libvpx-vp9", g="10", lag_in_frames="0"
    )
    packed = load(damaged(path, range(5), zeros))
    assert [number_of(jpeg) for jpeg in packed.frames] == list(range(10, 40))
    assert packed.change == "vp9 to JPEG, damaged part left out"


def test_frames_that_need_earlier_ones_are_left_out_at_the_start(tmp_path):
    path = make(
        tmp_path / "a.ts", [numbered(n) for n in range(40)], "libx264", g="10", bf="0", sc_threshold="0"
    )
    data = path.read_bytes()
    path.write_bytes(data[188 * (len(data) // 188 // 3) :])
    packed = load(path)
    numbers = [number_of(jpeg) for jpeg in packed.frames]
    assert numbers == list(range(numbers[0], 40)) and numbers[0] in (10, 20)


def test_files_that_are_no_videos_are_named(tmp_path):
    short = make(tmp_path / "short.avi", [numbered(n) for n in range(4)])
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 80, 60, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        container.start_encoding()
        mux_jpeg(container, cover, encoded(pixels(1)))
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        noise.sample_rate = 16000
        container.mux([*sound.encode(noise), *sound.encode()])
    write(tmp_path / "empty.mp4", b"")
    assert reason(tmp_path / "empty.mp4") == "empty file"
    unknown = "not a video, or its header is damaged or missing"
    hostile = {
        "page.mp4": b"<html><body>404 Not Found</body></html>",
        "zeros.mp4": bytes(100_000),
        "random.mp4": np.random.default_rng(1).bytes(100_000),
        "picture.mp4": encoded(pixels(1)),
        "playlist.mp4": f"#EXTM3U\n#EXTINF:1,\n{short}\n#EXT-X-ENDLIST\n".encode(),
        "script.mp4": f"ffconcat version 1.0\nfile {short.name}\n".encode(),
    }
    for name, data in hostile.items():
        write(tmp_path / name, data)
        assert reason(tmp_path / name) == unknown, name
    (tmp_path / "folder.mp4").mkdir()
    assert reason(tmp_path / "folder.mp4") == "not a regular file"
    assert reason(tmp_path / "absent.mp4") == "no video file"
    assert reason(tmp_path / "sound.wav") == unknown
    assert reason(tmp_path / "song.mp4") == "no video stream"
    assert reason(short, max_pixels=7000) == "more than --max-pixels 7000"


def test_a_jump_in_time_does_not_fill_the_memory(tmp_path):
    times = [Fraction(0), Fraction(1, 10), Fraction(200_000)]
    path = make(tmp_path / "a.mkv", [numbered(n) for n in range(3)], "ffv1", pixel_format="bgr0", times=times)
    data = path.read_bytes()
    assert reason(path) == HOPELESS[0]
    assert reason(cut(path, 0.8)) == HOPELESS[0]
    place = data.index(b"\x44\x89\x88") + 3  # the duration in a Matroska header; no duration is declared
    path.write_bytes(data[:place] + bytes(8) + data[place + 8 :].replace(b"DURATION", b"NOTATION"))
    packed = load(path)
    assert [number_of(jpeg) for jpeg in packed.frames] == [0, 0, 0, 1]
    assert packed.change == "ffv1 to JPEG, damaged part left out"


def test_random_damage_is_rejected_or_cut_off(tmp_path):
    random = np.random.default_rng(3)
    seen = set()
    for name, codec in (("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.ts", "mpeg2video"), ("a.gif", "gif")):
        pixel_format = "rgb8" if codec == "gif" else "yuv420p"
        path = make(tmp_path / name, [numbered(n) for n in range(12)], codec, pixel_format=pixel_format)
        whole = path.read_bytes()
        for _ in range(40):
            bent = bytearray(whole)
            for place in random.integers(0, len(whole), 3):
                bent[place] ^= int(random.integers(1, 256))
            path.write_bytes(bent)
            try:
                packed = load(path)
            except BadImage as error:
                seen.add(str(error))
            else:
                assert 1 <= len(packed.frames) <= 1800
    assert len(seen) > 2


# ---- whole datasets --------------------------------------------------------------------------------------

LAYOUTS = {
    "train": [
        "a_b/-id0_000007_000017.mp4",
        "a b/-id1_000007_000017.avi",
        "train/a_b/-id2_7_17.mkv",
        "train/-id3_000007_000017.mov",
        "-id4_000007_000017.mpg",
        "deep/er/a b/_id5_000007_000017.MP4",
    ],
    "val": ["val/a b/-id8_000007_000017.mp4", "val/-id9_000007_000017.mp4"],
}


def test_every_layout_is_found_and_bytes_do_not_depend_on_workers(tmp_path):
    source = tree(tmp_path / "source", LAYOUTS)
    write(source / "a_b/-id0_000007_000017.json", b"{}")  # a downloader's notes beside its video
    write(source / "train/-id3_000007_000017.mov.part", b"unfinished")
    for workers in (1, 2):
        assert pack_tree(source, tmp_path / str(workers), workers=workers) == 0
    assert sums(tmp_path / "1") == sums(tmp_path / "2")
    for split, names in LAYOUTS.items():
        rows = {row["source"]: row for row in rows_of(tmp_path / "1", split)}
        assert sorted(rows) == sorted(names)
        for number, name in enumerate(names):
            frames, first = frames_of(tmp_path / "1", split, rows[name]), 50 * (split == "val") + 8 * number
            assert [number_of(jpeg) for jpeg in frames] == [first + n for n in range(4)]
            assert rows[name]["class_name"] == "a b" and rows[name]["label"] == 0
    assert verify(tmp_path / "1") == 0


@pytest.mark.parametrize("kind", [VIDEOS, FRAMES])
def test_of_clips_with_one_name_the_nearest_is_used(tmp_path, kind, capsys):
    """Frame folders were only found with six digits and without folders of splits."""
    suffix = "" if kind is FRAMES else ".ts"
    files = [f"{place}/{name}{suffix}" for place in ("k", "val/l_m", "train/l m") for name in ("a_7_17", "x")]
    for path in [*files, "k/a_000007_000017.json", "l m/b_000000_000010.strange"]:
        write(tmp_path / path / "1.jpg" if kind is FRAMES and path in files else tmp_path / path, b"")
    text = "label,youtube_id,time_start,time_end\nl m,a,7,17\nl m,b,0,10\n"
    write(tmp_path / "train.csv", text.encode())
    listing = list_samples(tmp_path, kind, tmp_path / "train.csv", None, None)
    assert [item.source for item in listing.train] == [
        f"train/l m/a_7_17{suffix}",
        f"l_m/b_000000_000010{'.mp4' if suffix else ''}",
    ]
    assert listing.train[0].others == (f"val/l_m/a_7_17{suffix}", f"k/a_7_17{suffix}")
    assert {(item.name, item.group, item.label) for item in listing.train} == {
        ("a_000007_000017", "a", "l m"),
        ("b_000000_000010", "b", "l m"),
    }
    assert listing.left_out[f"{kind.what} in no list"] == (3, f"k/x{suffix}")
    assert listing.left_out[".strange files"] == (1, "l m/b_000000_000010.strange")
    assert "train.csv: 2 samples; Kinetics' clips; class names; 1 absent" in capsys.readouterr().out


def test_absent_and_damaged_videos_are_in_the_catalogue(tmp_path):
    source = tree(tmp_path / "source", LAYOUTS)
    (source / LAYOUTS["train"][0]).unlink()
    (source / LAYOUTS["train"][1]).write_bytes(b"<html>")
    assert pack_tree(source, tmp_path / "out") == 1
    rejected = {row["source"]: row["reason"] for row in rows_of(tmp_path / "out") if row["status"] != "ok"}
    assert rejected == {
        "a_b/-id0_000007_000017.mp4": "no video file",
        "a b/-id1_000007_000017.avi": "not a video, or its header is damaged or missing",
    }
    with pytest.raises(UserError, match=r"packed with fps 30\.0, not 15\.0; give another --out"):
        pack_tree(source, tmp_path / "out", fps=15.0)


def crash(root: Path, source: str, packing: Packing) -> Iterator[Packed]:
    """Stands for a decoder that ends its process."""
    os.abort()


def test_a_dying_worker_ends_the_run_with_one_line(tmp_path):
    samples = [Sample(f"{n}", 0, "a", f"{n}.mp4") for n in range(4)]
    options = ClipOptions(workers=2, shard_size=1)
    plan = PackPlan("video", ["a"], {"train": samples}, options.packing(videos=True))
    with pytest.raises(UserError, match="or by a file that crashes its decoder"):
        run(plan, tmp_path, tmp_path / "out", crash, options)


def test_each_wrong_use_ends_with_one_line(tmp_path, monkeypatch):
    source = tree(
        tmp_path / "source", {"train": ["-id0_000007_000017.mp4"], "val": ["-id1_000007_000017.mp4"]}
    )
    out, notes, options = tmp_path / "out", source / "annotations", ClipOptions()
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path)
    wrong = {
        "one of --frames and --videos": lambda: pack_clips(notes, out, options, source, source),
        "from one of --frames and --videos": lambda: pack_clips(notes, out, options),
        "nowhere is not a folder": lambda: pack_clips(notes, out, options, videos=tmp_path / "nowhere"),
        "--fps is 0; it must be above 0": lambda: pack_tree(source, out, fps=0.0),
        "--fps is nan; it must be above 0 ": lambda: pack_tree(source, out, fps=float("nan")),
        "--max-seconds is inf; it must be": lambda: pack_tree(source, out, max_seconds=float("inf")),
        "shorter than one frame at 0.05 frames per second": lambda: pack_tree(source, out, fps=0.05),
        "as bare/a_b/-id0_000007_000017.mp4; check": lambda: pack_clips(
            notes, out, options, videos=Path("bare")
        ),
        "one of FRAMES= and VIDEOS=": lambda: pack_all(options, frames=source, videos=source),
        "nowhere does not exist; check": lambda: pack_all(options, videos=tmp_path / "nowhere"),
    }
    for words, call in wrong.items():
        with pytest.raises(UserError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not out.exists(), "a wrong use leaves nothing behind"


def test_make_shards_takes_videos(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tree(
        tmp_path / "k400", {"train": ["train/-id0_000007_000017.mp4"], "val": ["val/-id1_000007_000017.mp4"]}
    )
    assert pack_all(ListOptions(workers=1), videos=Path("k400")) == 0
    assert rows_of(tmp_path / "shards/kinetics")[0]["frames"] == 4
    assert "is not packed" not in capsys.readouterr().out, "nobody named any"
    assert "$(if $(VIDEOS),--videos $(call quoted,$(VIDEOS)))" in (ROOT / "Makefile").read_text()
