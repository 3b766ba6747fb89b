"""Folders of frames: the number that counts the frames decides their order; --fps thins them."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from pipelines.dataset import read_info
from pipelines.errors import UserError
from tests.tools.test_pack import clip_tree, encoded, frames_of, rows_of, write
from tests.tools.test_pack_videos import number_of, numbered
from tools.clips import in_order, load_clip
from tools.images import BadImage
from tools.pack import ClipOptions, pack_clips


def named(pattern: str, count: int = 12) -> list[str]:
    return [pattern.format(n, n / 2, 40 * n) for n in range(count)]


IN_ORDER = {
    "times in seconds": named("{1:.2f}.jpg", 8),  # was 0 2 4 6 1 3 5 7
    "times of 30 a second": [f"{n / 30:.3f}.jpg".replace(".000", ".0") for n in range(40)],
    "times below a second": ["0.25.jpg", "0.5.jpg", "0.75.jpg", "0.9.jpg"],
    "whole and broken times": ["t1.jpg", "t1.5.jpg", "t2.jpg", "t10.5.jpg"],
    "a total": named("frame_{0}_of_12.jpg"),  # was sorted as text
    "a resolution": named("frame_{0}_480p.jpg"),
    "a copy's number": named("frame{0} (1).jpg"),
    "zero-padded": named("img_{0:05d}.jpg"),
    "not zero-padded": named("img{0}.png"),
    "the video's name": named("video.mp4.{0}.jpg"),
    "a video's number": named("v_ApplyEyeMakeup_g01_c02_{0:04d}.jpg"),
    "counted and timed": named("frame_{0}_at_{2}ms.jpg"),
    "every fifth": named("{2}.jpg"),
    "several suffixes": ["1.png", "2.jpg", "3.JPEG", "10.webp"],
    "versions": [f"v1.{n}.jpg" for n in range(7, 13)],
    "a score": ["f1_s90.jpg", "f2_s10.jpg", "f3_s55.jpg", "f10_s11.jpg"],
}


WITH_GAPS = ("several suffixes", "a score", "whole and broken times")


@pytest.mark.parametrize("kind", IN_ORDER)
def test_frames_follow_the_number_that_counts_them(kind):
    names = IN_ORDER[kind]
    assert in_order(names[::-1]) == (names, kind in WITH_GAPS)


IN_CONFLICT = {
    "img_00001.jpg and flow_x_00001.jpg": [
        f"{kind}_{n:05d}.jpg" for n in (1, 2) for kind in ("img", "flow_x")
    ],
    "flow_x_00001.jpg and flow_y_00001.jpg": [f"flow_{axis}_{n:05d}.jpg" for n in (1, 2) for axis in "xy"],
    "00001.jpg and 00001_mask.png": ["00001.jpg", "00001_mask.png", "00002.jpg", "00002_mask.png"],
    "00001.jpg and 00001.png": ["00001.jpg", "00001.png", "00002.jpg", "00002.png"],
    "cover.jpg and frame_1.jpg": ["cover.jpg", "frame_1.jpg", "frame_2.jpg"],
    "a.jpg and b.jpg": ["a.jpg", "b.jpg"],
    "01.jpg and 1.jpg": ["1.jpg", "01.jpg", "2.jpg"],
    "left_1_right_3.jpg and left_3_right_1.jpg": [f"left_{n}_right_{4 - n}.jpg" for n in (1, 2, 3)],
    "10.00.01.jpg and 10.01.00.jpg": ["10.00.01.jpg", "10.00.02.jpg", "10.01.00.jpg"],
    "v1.10.jpg and v1.2.jpg": ["v1.2.jpg", "v1.3.jpg", "v1.10.jpg"],
    "1_1.jpg and 1_2.jpg": ["1_1.jpg", "1_2.jpg", "2_1.jpg", "2_2.jpg"],
}


@pytest.mark.parametrize("names", IN_CONFLICT)
def test_ambiguous_folders_are_rejected_with_two_names(names):
    with pytest.raises(BadImage, match=r"its frames have .+, such as ") as caught:
        in_order(IN_CONFLICT[names])
    assert sorted(str(caught.value).partition("such as ")[2].split(" and ")) == sorted(names.split(" and "))


def test_an_ambiguous_folder_is_rejected_and_the_rest_is_packed(tmp_path):
    """Regression: pictures and optical flow were interleaved without a message."""
    clip_tree(tmp_path, {"train": [("a", f"v{n}") for n in range(2)], "val": [("a", "w")]}, frames=4)
    folder = tmp_path / "frames/a/v1_000007_000017"
    for path in sorted(folder.iterdir()):
        write(folder / path.name.replace("frame", "flow_x"), encoded(numbered(1)))
    options = ClipOptions(workers=1, max_reject=0.9)
    assert pack_clips(tmp_path / "annotations", tmp_path / "out", options, frames=tmp_path / "frames") == 0
    (bad,) = [row for row in rows_of(tmp_path / "out") if row["status"] != "ok"]
    assert bad["source"] == "a/v1_000007_000017"
    assert (
        bad["reason"]
        == "its frames have names of different kinds, such as flow_x_00001.jpg and frame_00001.jpg"
    )


# ---- frame rates -----------------------------------------------------------------------------------------


def folder(root: Path, count: int) -> Path:
    for number in range(count):
        write(root / "clip" / f"frame_{number + 1:05d}.jpg", encoded(numbered(number)))
    return root


def stored(root: Path, **options: float) -> list[int]:
    (part,) = load_clip(root, "clip", ClipOptions(**options).packing(videos=False))
    return [number_of(jpeg) for jpeg in part.frames]


@pytest.mark.parametrize(
    ("source", "fps"),
    [(30.0, 7.5), (30.0, 15.0), (30.0, 12.0), (25.0, 10.0), (29.97, 7.5), (30.0, 30.0), (24.0, 20.0)],
)
def test_frame_folders_are_thinned_to_the_nearest_frames(tmp_path, source, fps):
    found = stored(folder(tmp_path, 60), source_fps=source, fps=fps)
    times = [Fraction(n) / Fraction(source) for n in range(60)]
    assert len(found) == round(60 / Fraction(source) * Fraction(fps)) and len(set(found)) == len(found)
    for tick, number in enumerate(found):
        now = Fraction(tick) / Fraction(fps)
        assert abs(times[number] - now) <= min(abs(time - now) for time in times) + Fraction(1, 500)


def test_by_default_all_frames_are_stored_at_their_rate(tmp_path):
    assert stored(folder(tmp_path, 9), source_fps=12.0) == [*range(9)]
    assert ClipOptions(source_fps=12.0).packing(videos=False).fps == 12.0
    assert ClipOptions(source_fps=12.0).packing(videos=True).fps == 30.0


def test_frame_folders_cannot_get_more_frames(tmp_path):
    clip_tree(tmp_path, {"train": [("a", "v")], "val": [("a", "w")]})
    options = ClipOptions(fps=30.0, source_fps=25.0)
    with pytest.raises(
        UserError, match="--fps 30 is more than the frames have, --source-fps 25; lower --fps"
    ):
        pack_clips(tmp_path / "annotations", tmp_path / "out", options, frames=tmp_path / "frames")


def test_an_earlier_dataset_counts_as_packed_at_its_own_rate(tmp_path):
    """Before --source-fps, --fps was the rate that the folders have."""
    clip_tree(tmp_path, {"train": [("a", "v")], "val": [("a", "w")]})
    folders = {
        "annotations": tmp_path / "annotations",
        "frames": tmp_path / "frames",
        "out": tmp_path / "out",
    }
    rates = {"source_fps": 15.0, "fps": 15.0}
    assert pack_clips(options=ClipOptions(workers=1, **rates), **folders) == 0
    path = tmp_path / "out/dataset.json"
    info = json.loads(path.read_text())
    for name in ("source_fps", "max_seconds", "clip_seconds"):
        del info["packing"][name]
    path.write_text(json.dumps(info))
    assert pack_clips(options=ClipOptions(workers=1, **rates), **folders) == 0
    with pytest.raises(UserError, match=r"packed with source-fps 15\.0, not 30\.0"):
        pack_clips(options=ClipOptions(workers=1, fps=15.0), **folders)
    with pytest.raises(UserError, match=r"packed with max-seconds 60\.0, not 20\.0"):
        pack_clips(options=ClipOptions(workers=1, **rates, max_seconds=20.0), **folders)
    assert read_info(tmp_path / "out").fps == 15.0
    assert len(frames_of(tmp_path / "out", "train", rows_of(tmp_path / "out")[0])) > 1
