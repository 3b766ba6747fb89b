"""Long videos and frame folders become several clips: no frame is lost, none is in two clips."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from tests.tools.test_pack import ROOT, encoded, frames_of, rows_of, sums, write
from tests.tools.test_pack_videos import PACKING, damaged, make, number_of, numbered, pack_tree, tree, zeros
from tools import predict
from tools.clips import load_clip
from tools.images import BadImage, Packed
from tools.pack import ClipOptions
from tools.shards import VideoPacking
from tools.sources import Part
from tools.verify import verify
from tools.videos import load_video
from train.presets import FINETUNE_PRESETS

SHORT = replace(PACKING, fps=10.0, max_seconds=3.0, clip_seconds=1.0)
LOST = "less than half of its declared duration can be decoded"


def parts(path: Path, packing: VideoPacking = SHORT) -> list[Part]:
    return list(load_video(path.parent, path.name, packing))


def numbers(part: Part) -> list[int]:
    assert isinstance(part, Packed)
    return [number_of(jpeg) for jpeg in part.frames]


def rejected(found: list[Part]) -> dict[str, str]:
    return {part.span: str(part) for part in found if isinstance(part, BadImage)}


@pytest.mark.parametrize(
    ("name", "codec", "count", "sizes"),
    [
        ("a.mp4", "libx264", 40, [10] * 4),
        ("a.mkv", "mpeg4", 43, [11, 11, 10, 11]),
        ("a.ts", "mpeg2video", 35, [12, 11, 12]),
        ("a.flv", "flv", 34, [11, 12, 11]),
    ],
)
def test_a_long_video_becomes_clips_of_equal_length(tmp_path, name, codec, count, sizes):
    """Regression: it was rejected as longer than --max-seconds."""
    rate = 25 if codec == "mpeg2video" else 10
    path = make(tmp_path / name, [numbered(n) for n in range(count * rate // 10)], codec, rate, g="5")
    whole = numbers(parts(path, replace(SHORT, max_seconds=60.0))[0])
    found = parts(path)
    assert [number for part in found for number in numbers(part)] == whole
    assert len(whole) == count and [len(numbers(part)) for part in found] == sizes
    ends = [0, *(sum(sizes[: n + 1]) / 10 for n in range(len(sizes)))]
    assert [part.span for part in found] == [f"#t={a:g},{b:g}" for a, b in pairwise(ends)]
    (change,) = {part.change for part in found if isinstance(part, Packed)}
    assert change.endswith(" to JPEG, part of a longer clip")


@pytest.mark.parametrize(("count", "sizes"), [(34, [10, 10, 14]), (36, [10, 10, 10, 6]), (70, [10] * 7)])
def test_a_long_video_that_declares_no_duration_is_cut_as_it_is_read(tmp_path, count, sizes):
    """A rest of less than half a clip is added to the clip before it."""
    path = make(tmp_path / "a.mkv", [numbered(n) for n in range(count)], "libx264", 10)
    data = path.read_bytes()
    place = data.index(b"\x44\x89\x88") + 3
    path.write_bytes(data[:place] + bytes(8) + data[place + 8 :].replace(b"DURATION", b"NOTATION"))
    found = parts(path)
    assert [number for part in found for number in numbers(part)] == [*range(count)]
    assert [len(numbers(part)) for part in found] == sizes


def test_a_video_up_to_max_seconds_stays_one_clip(tmp_path):
    path = make(tmp_path / "a.mp4", [numbered(n) for n in range(30)], rate=10)
    (part,) = parts(path)
    assert numbers(part) == [*range(30)] and part.span == ""


def test_damage_ends_its_clip_and_later_clips_begin_at_a_key_frame(tmp_path):
    path = make(
        tmp_path / "a.mp4", [numbered(n) for n in range(60)], "libx264", 10, g="4", bf="0", sc_threshold="0"
    )
    found = parts(damaged(path, range(17, 18), zeros))  # 7 of the 10 frames of the second clip are good
    assert [numbers(part) for part in found[:2]] == [[*range(10)], [*range(10, 17)]]
    assert found[1].change == "h264 to JPEG, damaged part left out, part of a longer clip"
    assert found[1].span == "#t=1,2"
    assert [numbers(part) for part in found[2:]] == [[*range(n, n + 10)] for n in (20, 30, 40, 50)]
    found = parts(damaged(path, range(13, 14), zeros))  # 3 are good; the next key frame is in the same clip
    assert rejected(found) == {"#t=1,2": LOST} and len(found) == 6
    found = parts(damaged(path, range(13, 32), zeros))  # frames 13 to 31; 32 is the next key frame
    assert rejected(found) == {"#t=1,3": LOST}
    assert [numbers(part) for part in found if isinstance(part, Packed)][1] == [*range(32, 40)]
    found = parts(damaged(path, range(24, 60), zeros))
    assert rejected(found) == {"#t=2,6": LOST} and len(found) == 3
    with pytest.raises(BadImage, match=LOST):
        parts(damaged(path, range(2, 60), zeros))


def test_the_clips_of_a_video_are_in_one_split_and_one_shard(tmp_path):
    source = tree(
        tmp_path / "source",
        {"train": [f"id{n}x_000007_000017.mp4" for n in range(5)], "val": ["valx_7_17.mp4"]},
    )
    make(source / "id1x_000007_000017.mp4", [numbered(n) for n in range(100)], rate=10)
    options = {"max_seconds": 4.0, "clip_seconds": 2.5, "fps": 10.0, "shard_size": 2}
    assert pack_tree(source, tmp_path / "1", **options) == 0
    assert pack_tree(source, tmp_path / "2", **options, workers=2) == 0
    assert sums(tmp_path / "1") == sums(tmp_path / "2")
    rows = [row for row in rows_of(tmp_path / "1") if row["source"].startswith("id1x")]
    name = rows[0]["key"][:-2]
    assert [row["key"] for row in rows] == [f"{name}-{n}" for n in range(4)]
    assert [row["source"].partition("#")[2] for row in rows] == ["t=0,2.5", "t=2.5,5", "t=5,7.5", "t=7.5,10"]
    assert len({row["shard"] for row in rows}) == 1 and len(rows_of(tmp_path / "1")) == 8
    found = [number_of(jpeg) for row in rows for jpeg in frames_of(tmp_path / "1", "train", row)]
    assert found == [*range(100)]
    assert verify(tmp_path / "1") == 0


def test_prediction_names_the_parts_of_a_long_video(tmp_path):
    path = make(
        tmp_path / "a.mp4", [numbered(n) for n in range(60)], "libx264", 10, g="5", bf="0", sc_threshold="0"
    )
    bad, short = damaged(path, range(11, 13), zeros), make(tmp_path / "b.mp4", [numbered(1)] * 9, rate=10)
    (tmp_path / "out").mkdir()
    packing = {name: getattr(SHORT, name) for name in ("fps", "max_seconds", "clip_seconds")}
    config = FINETUNE_PRESETS["video-ft-pico"]
    names, reasons = predict.pack(config, [bad, short], packing, tmp_path / "out")
    parts = [f"{bad}#t={n},{n + 1}" for n in (0, 2, 3, 4, 5, 1)]
    assert names == [*parts, str(short)]
    assert reasons == ["", "", "", "", "", LOST, ""]


def test_a_long_folder_of_frames_becomes_clips(tmp_path):
    names = [f"frame_{n:05d}.jpg" for n in range(1, 46)]
    for number, name in enumerate(names):
        write(tmp_path / "clip" / name, encoded(numbered(number)))
    packing = ClipOptions(source_fps=10.0, max_seconds=3.0, clip_seconds=1.0).packing(videos=False)
    found = list(load_clip(tmp_path, "clip", packing))
    assert [numbers(part) for part in found] == [
        [*range(a, b)] for a, b in ((0, 11), (11, 22), (22, 34), (34, 45))
    ]
    assert [part.span for part in found] == ["#t=0,1.1", "#t=1.1,2.2", "#t=2.2,3.4", "#t=3.4,4.5"]
    assert found[0].change == "copied, part of a longer clip"
    for number in (12, 14, 16, 18, 20):
        (tmp_path / "clip" / names[number]).write_bytes(b"")
    found = list(load_clip(tmp_path, "clip", packing))
    assert rejected(found) == {"#t=1.1,2.2": "fewer than half of its frames in a row are good: empty file"}
    assert len(found) == 4


LOADER = """
import resource, sys
from pathlib import Path
from tools.pack import ClipOptions
from tools.shards import Job, Sample, pack_shard
from tools.videos import load_video

root = Path(sys.argv[1])
packing = ClipOptions(max_seconds=2.0, clip_seconds=1.0).packing(videos=True)
(root / "out").mkdir()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(pack_shard(Job(root, root / "out", 0, [Sample("a", 0, "", sys.argv[2])], "video", packing, load_video)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_memory_does_not_grow_with_the_length_of_a_video(tmp_path):
    noise = [Image.effect_noise((320, 240), 120).convert("RGB") for _ in range(10)]
    grown = {}
    for seconds in (3, 18):
        folder = tmp_path / str(seconds)
        make(folder / "a.mkv", noise * 3 * seconds, "mjpeg", pixel_format="yuvj420p")
        command = [sys.executable, "-c", LOADER, str(folder), "a.mkv"]
        lines = subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.splitlines()
        grown[seconds] = int(lines[-1])  # KiB
    stored = sum(path.stat().st_size for path in (tmp_path / "18").glob("out/*.tar"))
    assert stored > 15 * 2**20, "the video is long enough to be noticed"
    assert grown[18] - grown[3] < stored / 1024 / 3
