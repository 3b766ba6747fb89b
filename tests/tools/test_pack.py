"""Packing: other readers read the tars, bytes do not depend on the run, bad input is named and never lost."""

import hashlib
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image, ImageOps

from pipelines.errors import UserError, run_cli
from tests.pipelines_fixtures import read_rows
from tools import pack, packing
from tools.clips import longest_run
from tools.pack import ClipOptions, ImageOptions, ListOptions

ROOT = Path(__file__).resolve().parents[2]


def pixels(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}), **options)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def image_tree(root: Path, train: int = 12, val: int = 4, size: tuple[int, int] = (80, 60)) -> Path:
    """`train` and `val` pictures in each of three classes, in ImageNet's layout."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(("n01", "n02 with spaces", "n03")):
            for number in range(count):
                seed = 1000 * label + number + 500 * (split == "val")
                write(root / split / name / f"{split}_{number}.JPEG", encoded(pixels(seed, size)))
    return root


def clip_tree(root: Path, rows: dict[str, list[tuple[str, str]]], frames: int = 6) -> Path:
    """Clips of `frames` frames for {split: [(label, id), ...]}, in Tiny-Kinetics-400's layout."""
    for split, clips in rows.items():
        lines = ["label,youtube_id,time_start,time_end,split,is_cc"]
        for number, (label, video) in enumerate(clips):
            lines.append(f'"{label}",{video},7,17,{split},0')
            folder = root / "frames" / label.replace(" ", "_") / f"{video}_000007_000017"
            for frame in range(frames):
                seed = 100 * number + frame + 50_000 * (split == "val")
                write(folder / f"frame_{frame + 1:05d}.jpg", encoded(pixels(seed)))
        write(root / "annotations" / f"tiny_{split}.csv", "\n".join([*lines, ""]).encode())
    return root


RIDING, JUMPING = "riding a bike", "jumping, twice"
CLIPS = {
    "train": [*((RIDING, f"-id{n}") for n in range(4)), *((JUMPING, f"_id{n}") for n in range(4))],
    "val": [(RIDING, "-val0"), (JUMPING, "--_val1")],
}


def pack_images(source: Path, out: Path, **options) -> int:
    return pack.pack_images(source, out, ImageOptions(**{"workers": 1, "shard_size": 8, **options}))


def pack_clips(root: Path, out: Path, **options) -> int:
    all_options = ClipOptions(**{"workers": 1, "shard_size": 3, **options})
    return pack.pack_clips(root / "annotations", out, all_options, frames=root / "frames")


def rows_of(out: Path, split: str = "train") -> list[dict]:
    return read_rows(out, split)


def frames_of(out: Path, split: str, row: dict) -> list[bytes]:
    tar = (out / split / f"{row['shard']:06d}.tar").read_bytes()
    return [tar[at : at + size] for at, size in zip(row["offsets"], row["sizes"], strict=True)]


def sums(out: Path) -> dict[str, str]:
    """The sha256 of every file below `out`, hidden ones too."""
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def dali_decode(jpegs: list[bytes]) -> list[np.ndarray]:
    pipeline = Pipeline(len(jpegs), 2, None, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(fn.decoders.image(fn.external_source(name="jpegs"), device="cpu"))
    pipeline.build()
    pipeline.feed_input("jpegs", [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs])
    (out,) = pipeline.run()
    return [np.array(out[index]) for index in range(len(jpegs))]


# ---- other readers ---------------------------------------------------------------------------------------


def by_webdataset(tars: list[Path], names: list[str]) -> list[tuple[bytes, ...]]:
    samples = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
    return [tuple(sample[name] for name in names) for sample in samples]


def by_dali(tars: list[Path], names: list[str], indexed: bool = True) -> list[tuple[bytes, ...]]:
    """As read with our index or without one, each sample once."""
    pipeline = Pipeline(1, 1, None)
    with pipeline:
        read = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars] if indexed else [],
            ext=names,
            missing_component_behavior="error",
            name="reader",
        )
        pipeline.set_outputs(*read)
    pipeline.build()
    count = pipeline.epoch_size("reader")
    return [tuple(np.array(part[0]).tobytes() for part in pipeline.run()) for _ in range(count)]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_webdataset_and_dali_read_what_the_catalogue_lists(tmp_path, kind):
    if kind == "image":
        assert pack_images(image_tree(tmp_path / "source"), tmp_path / "out") == 0
        frames = ["jpg"]
    else:
        assert pack_clips(clip_tree(tmp_path / "source", CLIPS), tmp_path / "out") == 0
        frames = [f"f{number:04d}.jpg" for number in range(6)]
    for split in ("train", "val"):
        tars = sorted((tmp_path / "out" / split).glob("*.tar"))
        rows = rows_of(tmp_path / "out", split)
        labels = [str(row["label"]).encode() for row in rows]
        expected = [
            (*frames_of(tmp_path / "out", split, row), label) for row, label in zip(rows, labels, strict=True)
        ]
        assert len(tars) == -(-len(rows) // (8 if kind == "image" else 3))
        assert by_webdataset(tars, [*frames, "cls"]) == expected
        assert by_dali(tars, [*frames, "cls"]) == expected
        told = [json.loads(text) for (text,) in by_webdataset(tars, ["json"])]
        assert all(told[i][name] == rows[i][name] for i in range(len(rows)) for name in told[i])


def test_tars_are_plain_and_labels_mixed(tmp_path):
    pack_images(image_tree(tmp_path / "source"), tmp_path / "out")
    with tarfile.open(tmp_path / "out/train/000000.tar") as tar:
        members = tar.getmembers()
    assert all(not member.pax_headers and member.mtime == 0 and member.uid == 0 for member in members)
    assert [member.name.partition(".")[2] for member in members] == ["jpg", "cls", "json"] * 8
    data = io.BytesIO()
    packed = tmp_path / "out/train/000000.tar"
    with (
        tarfile.open(packed) as tar,
        tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as plain,
    ):
        for member in tar:
            again = tarfile.TarInfo(member.name)
            again.size = member.size
            plain.addfile(again, tar.extractfile(member))
    assert packed.read_bytes() == data.getvalue(), "the bytes are those that tarfile writes"
    first_shard = {row["label"] for row in rows_of(tmp_path / "out") if row["shard"] == 0}
    assert first_shard == {0, 1, 2}, "a shard of one class would ruin training"


# ---- the same bytes, however they came about -------------------------------------------------------------


def test_bytes_do_not_depend_on_workers(tmp_path):
    clip_tree(tmp_path / "source", CLIPS)
    for workers in (1, 2):
        assert pack_clips(tmp_path / "source", tmp_path / str(workers), workers=workers) == 0
    assert sums(tmp_path / "1") == sums(tmp_path / "2")


def test_after_kills_at_random_moments_the_bytes_are_the_same(tmp_path):
    source = image_tree(tmp_path / "source", train=40, val=10, size=(500, 400))
    pack_images(source, tmp_path / "calm", shard_size=2)
    random = np.random.default_rng()  # another moment each time the test runs: any must do
    out = tmp_path / "killed"
    words = ["tools.pack", "images", "--source", source, "--out", out, "--shard-size", "2", "--workers"]
    kept: dict[Path, int] = {}
    for workers in ("1", "2", "1"):
        goal = len(kept) + int(random.integers(1, 12))
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, words), workers], cwd=ROOT, stdout=-3, stderr=-3
        )
        while len(list(out.glob("*/*.parquet"))) < goal and process.poll() is None:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "dataset.json").exists(), "it was to be killed before its end"
        done = {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}
        assert kept.items() <= done.items(), "a finished shard was packed again"
        kept = done
    wait_until_quiet(out)  # the killed parent's worker processes end by themselves
    assert pack_images(source, out, shard_size=2) == 0
    assert sums(out) == sums(tmp_path / "calm")


def wait_until_quiet(out: Path) -> None:
    seen: list[tuple[float, set[Path]]] = [(0.0, set())]
    while len(seen) < 4 or any(one != other for one, other in pairwise(seen[-4:])):
        time.sleep(0.1)
        paths = set(out.rglob("*"))
        seen.append((max(path.stat().st_mtime for path in paths), paths))


def test_a_finished_dataset_is_not_changed_and_other_settings_are_refused(tmp_path, capsys):
    source = image_tree(tmp_path / "source", train=3, val=1)
    pack_images(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert pack_images(source, tmp_path / "out") == 0
    assert "out is already packed with these settings. The contents of the source files are not" in " ".join(
        capsys.readouterr().out.split()
    )
    with pytest.raises(UserError, match="packed with short-side 256, not 100; give another --out"):
        pack_images(source, tmp_path / "out", short_side=100)
    with pytest.raises(UserError, match="packed with shard-size 8, not 4"):
        pack_images(source, tmp_path / "out", shard_size=4)
    write(source / "train/n01/one_more.JPEG", encoded(pixels(9)))
    with pytest.raises(UserError, match="another list of source files"):
        pack_images(source, tmp_path / "out")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert after == before


# ---- hostile pictures ------------------------------------------------------------------------------------


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def peculiar() -> dict[str, tuple[bytes, str]]:
    """Readable files of every odd kind, and what the catalogue must say was done to each."""
    image = pixels(1)
    wide = Image.fromarray(np.asarray(pixels(2).convert("L")).astype(np.uint16) * 257)
    glass = image.convert("RGBA")
    glass.putalpha(pixels(3).convert("L"))
    whole = encoded(image)
    return {
        "plain.jpg": (whole, "copied"),
        "gray.jpg": (encoded(image.convert("L")), "copied"),
        "progressive.jpg": (encoded(image, progressive=True), "copied"),
        "restarts.jpg": (encoded(image, restart_marker_blocks=1), "copied"),
        "tail.jpg": (whole + b"tail\xff\xd9", "bytes after its end cut off"),
        "cmyk.jpg": (encoded(image.convert("CMYK")), "CMYK to RGB"),
        "turned.jpg": (encoded(image, exif=exif(6)), "turned upright as its EXIF says"),
        "mirrored.jpg": (encoded(image, exif=exif(2)), "turned upright as its EXIF says"),
        "large.jpg": (encoded(pixels(4, (700, 500))), "resized"),
        "a png.JPEG": (encoded(image, "PNG"), "PNG to JPEG"),
        "16 bit.jpg": (encoded(wide, "PNG"), "PNG to JPEG, 16 bit to 8 bit"),
        "alpha.jpg": (encoded(glass, "PNG"), "PNG to JPEG, transparency on white"),
        "alpha webp.jpg": (encoded(glass, "WEBP", lossless=True), "WEBP to JPEG, transparency on white"),
        "gif.jpg": (encoded(image, "GIF"), "GIF to JPEG, P to RGB"),
        "bilevel.png": (encoded(image.convert("1"), "PNG"), "PNG to JPEG, 1 to RGB"),
    }


def hopeless() -> dict[str, tuple[bytes, str]]:
    """Files that cannot be packed, and the reason the catalogue must give."""
    whole = encoded(pixels(1))
    return {
        "empty.jpg": (b"", "empty file"),
        "page.jpg": (b"<html><body>404 Not Found</body></html>", "HTML, which is not supported"),
        "half.jpg": (whole[: len(whole) // 2], "truncated"),
        "half.png": (encoded(pixels(1), "PNG")[:2000], "truncated"),
        "zeros.jpg": (bytes(4000), "not an image"),
        "huge.jpg": (encoded(pixels(1, (2000, 1000))), "more than --max-pixels 1000000"),
    }


def mangled() -> dict[str, bytes]:
    """Truncations at every 10 %, single-byte flips all over and through the headers, random bytes."""
    random = np.random.default_rng(5)
    files = {}
    kinds = {"plain": {}, "progressive": {"progressive": True}, "exif": {"exif": exif(6)}}
    for kind, options in kinds.items():
        whole = encoded(pixels(6), **options)
        files |= {f"{kind} cut {k}.jpg": whole[: len(whole) * k // 10] for k in range(10)}
        header = whole.index(b"\xff\xda")
        for place in [*range(2, header, 9), *random.integers(0, len(whole), 40).tolist()]:
            flipped = bytearray(whole)
            flipped[place] ^= int(random.integers(1, 256))
            files[f"{kind} flip {place}.jpg"] = bytes(flipped)
    return files | {f"random {k}.jpg": b"\xff\xd8\xff" * (k % 2) + random.bytes(500 * k) for k in range(20)}


def test_every_hostile_picture_is_listed_and_packed_ones_decode(tmp_path):
    told = {**peculiar(), **hopeless()}
    files = {name: data for name, (data, _) in told.items()} | mangled()
    for name, data in files.items():
        write(tmp_path / "source" / name, data)
    code = pack_images(tmp_path / "source", tmp_path / "out", max_pixels=1_000_000, val_fraction=0.2)
    assert code == 1, "far more than 1 % is rejected"
    rows = [(split, row) for split in ("train", "val") for row in rows_of(tmp_path / "out", split)]
    assert sorted(row["source"] for _, row in rows) == sorted(files)
    assert all((row["status"] == "rejected") == (row["reason"] != "") for _, row in rows)
    said = {row["source"]: row["change"] or row["reason"] for _, row in rows}
    assert {name: said[name] for name in told} == {name: what for name, (_, what) in told.items()}
    good = [(row, *frames_of(tmp_path / "out", split, row)) for split, row in rows if row["status"] == "ok"]
    assert len(good) > 200
    for (row, data), decoded in zip(good, dali_decode([data for _, data in good]), strict=True):
        assert decoded.shape == (row["height"], row["width"], 3), row["source"]
        ours = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.abs(ours.astype(int) - decoded).mean() < 3, row["source"]
        if row["source"] in told:
            check_against_source(files[row["source"]], row, data, decoded)


def check_against_source(source: bytes, row: dict, packed: bytes, decoded: np.ndarray) -> None:
    """Copied files are byte-equal; the others look like the source, upright, on white."""
    if row["change"] == "copied":
        assert packed == source
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(source)))
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
    if "transparency" in row["change"]:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    picture = picture.convert("RGB").resize((row["width"], row["height"]), Image.Resampling.BICUBIC)
    expected = np.asarray(picture)
    dithered = row["source"] in ("bilevel.png", "gif.jpg")
    assert np.abs(expected.astype(int) - decoded).mean() < (12 if dithered else 4)


def test_larger_pictures_are_scaled_to_the_short_side(tmp_path):
    write(tmp_path / "source/a.jpg", encoded(pixels(1, (700, 500))))
    write(tmp_path / "source/b.jpg", encoded(pixels(1, (300, 900)), exif=exif(6)))
    pack_images(tmp_path / "source", tmp_path / "out", val_fraction=0.0, short_side=100)
    sizes = {row["source"]: (row["width"], row["height"]) for row in rows_of(tmp_path / "out")}
    assert sizes == {"a.jpg": (140, 100), "b.jpg": (300, 100)}


# ---- clips -----------------------------------------------------------------------------------------------


def test_clips_with_bad_frames_keep_their_longest_good_run(tmp_path):
    clip_tree(tmp_path, {"train": [("a b", f"-v{n}") for n in range(5)], "val": [("a b", "_v")]}, frames=10)

    def frame(clip: int, number: int) -> Path:
        return tmp_path / f"frames/a_b/-v{clip}_000007_000017/frame_{number:05d}.jpg"

    frame(0, 3).write_bytes(b"")  # frames 4 to 10 are left: 7
    frame(1, 6).write_bytes(b"<html>")  # 1 to 5: half
    frame(2, 5).write_bytes(b"")
    frame(2, 10).write_bytes(b"")  # 1 to 4: under half
    frame(3, 2).write_bytes(encoded(pixels(1, (40, 30))))  # another size than the rest
    frame(4, 4).unlink()  # a gap in the numbers is no fault
    assert pack_clips(tmp_path, tmp_path / "out") == 1
    rows = {row["source"][6]: row for row in rows_of(tmp_path / "out")}
    assert rows["4"]["change"] == "gaps in its frame numbers closed"
    assert [rows[str(n)]["frames"] for n in range(5)] == [7, 5, 0, 10, 9]
    assert rows["0"]["change"] == rows["1"]["change"] == "bad frames cut off"
    assert rows["2"]["reason"] == "fewer than half of its frames in a row are good: empty file"
    assert frames_of(tmp_path / "out", "train", rows["0"]) == [frame(0, n).read_bytes() for n in range(4, 11)]
    packed = frames_of(tmp_path / "out", "train", rows["3"])
    assert {picture.shape for picture in dali_decode(packed)} == {(60, 80, 3)}
    assert packed[0] == frame(3, 1).read_bytes() and rows["3"]["change"] == "resized"


def test_longest_run():
    assert longest_run([True, False, True, True, False, True, True]) == (2, 4)
    assert longest_run([False, False]) == (0, 0)


def test_annotated_but_absent_videos_are_rejected_by_name(tmp_path):
    clip_tree(tmp_path, CLIPS)
    annotations = tmp_path / "annotations/tiny_train.csv"
    annotations.write_text(annotations.read_text() + "riding a bike,-absent,1,11,train,0\n")
    (tmp_path / "frames/riding_a_bike/-empty_000001_000011").mkdir()
    annotations.write_text(annotations.read_text() + "riding a bike,-empty,1,11,train,0\n")
    assert pack_clips(tmp_path, tmp_path / "out") == 1
    rejected = {row["source"]: row["reason"] for row in rows_of(tmp_path / "out") if row["status"] != "ok"}
    assert rejected == {
        "riding_a_bike/-absent_000001_000011": "no frame folder",
        "riding_a_bike/-empty_000001_000011": "no frames in its folder",
    }
    info = json.loads((tmp_path / "out/dataset.json").read_text())
    assert info["classes"] == ["jumping, twice", "riding a bike"]
    assert info["splits"]["train"] == {"samples": 8, "rejected": 2, "frames": 48, "shards": 4}


def test_published_names_are_found_and_frames_are_sorted_by_number(tmp_path):
    clip_tree(tmp_path, CLIPS, frames=1)
    folder = tmp_path / "frames/riding_a_bike/-id0_000007_000017"
    for number in (2, 9, 10, 11, 100):
        write(folder / f"frame_{number}.jpg", encoded(pixels(number)))
    assert pack_clips(tmp_path, tmp_path / "out") == 0
    names = {row["source"]: row["class_name"] for row in rows_of(tmp_path / "out", "val")}
    assert names == {
        "riding_a_bike/-val0_000007_000017": "riding a bike",
        "jumping,_twice/--_val1_000007_000017": "jumping, twice",
    }
    row = next(row for row in rows_of(tmp_path / "out") if row["source"].endswith("-id0_000007_000017"))
    expected = [encoded(pixels(0)), *(encoded(pixels(number)) for number in (2, 9, 10, 11, 100))]
    assert frames_of(tmp_path / "out", "train", row) == expected


# ---- splits and wrong uses -------------------------------------------------------------------------------


def test_folders_without_val_are_split_by_fraction(tmp_path):
    for number in range(20):
        write(tmp_path / "flat" / f"{number}.jpg", encoded(pixels(number)))
        write(tmp_path / "classes" / "ab"[number % 2] / f"{number}.jpg", encoded(pixels(number)))
    for name in ("flat", "classes"):
        assert pack_images(tmp_path / name, tmp_path / f"{name} out", val_fraction=0.2) == 0
        train, val = (rows_of(tmp_path / f"{name} out", split) for split in ("train", "val"))
        sources = sorted(row["source"] for row in [*train, *val])
        assert (len(train), len(val), len(set(sources))) == (16, 4, 20)
    assert {row["label"] for row in rows_of(tmp_path / "flat out")} == {-1}
    assert sorted(row["label"] for row in rows_of(tmp_path / "classes out", "val")) == [0, 0, 1, 1]


def flat_val(root: Path) -> Path:
    """Two classes to learn and four loose validation pictures, whose classes are b a b b."""
    for name in "ab":
        write(root / "train" / name / "1.JPEG", encoded(pixels(ord(name))))
    for number in range(1, 5):
        write(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", encoded(pixels(number)))
    return root


VAL = "ILSVRC2012_val_0000000"
LABELS = {
    "kaggle": f"ImageId,PredictionString\n{VAL}2,a 85 1 499 272 a 2 2 2 2 \n{VAL}1,b 1\n{VAL}3,b\n{VAL}4,b\n",
    "quoted": f'"{VAL}4","b"\r\n"{VAL}1","b"\r\n"{VAL}2","a"\r\n"{VAL}3","b"\r\n',
    "names": f"\ufeffval/{VAL}1.JPEG b\n{VAL}2.JPEG\ta\n\n{VAL}3.JPEG b\n{VAL}4.JPEG b",
    "in order": "b\na\nb\nb\n",
    "numbers": "1\n3\n1\n1\n",
}


@pytest.mark.parametrize("kind", LABELS)
def test_the_classes_of_a_flat_val_folder_are_read_from_a_file(tmp_path, kind):
    source = flat_val(tmp_path / "source")
    write(tmp_path / "labels", LABELS[kind].encode())
    write(tmp_path / "synsets", b"b kit fox\nc\na\n")
    synsets = tmp_path / "synsets" if kind == "numbers" else None
    assert pack_images(source, tmp_path / "out", val_list=tmp_path / "labels", synsets=synsets) == 0
    rows = sorted(rows_of(tmp_path / "out", "val"), key=lambda row: row["source"])
    assert [(row["class_name"], row["label"]) for row in rows] == [("b", 1), ("a", 0), ("b", 1), ("b", 1)]


def test_wrong_validation_labels_end_with_one_line(tmp_path):
    source = flat_val(tmp_path / "source")
    labels, synsets, out = tmp_path / "labels", tmp_path / "synsets", tmp_path / "out"
    wrong = {
        (b"b\na\nb\n", None): "labels has 3 labels for 4 pictures; give one per picture.",
        (b"b\na\nq\nb", None): "labels line 3: 'q' is not a class folder of train; correct it.",
        (b"1\n2\n1\n1", None): "labels contains class numbers; give --synsets FILE",
        (b"1\n2\n3\n1", b"b\na"): "labels line 3: '3' is not a number from 1 to 2",
        (b"1\n2\n0\n1", b"b\na"): "labels line 3: '0' is not a number from 1 to 2",
        (b"1\n2\n1\n" + b"1" * 5000, b"b\na"): "is not a number from 1 to 2",
        (b"1\nb\n1\n1", b"b\na"): "labels line 2: 'b' is not a number",
        (b"1\n2\n1\n1", b"b\nq"): "labels line 2: 'q' is not a class",
        (b"1\n2\n1\n1", b"\n".join(b"%04d" % n for n in range(1000))): "synsets is in alphabetical order",
        (b"b\na\nb\nb", b"b\na"): "has no class numbers, and --synsets is for those",
        (LABELS["kaggle"].encode(), b"b\na"): "has no class numbers, and --synsets is for those",
        (f"{VAL}1,b\n{VAL}9,b".encode(), None): f"labels line 2: '{VAL}9' is not a picture of val",
        (f'{VAL}1,b\n{VAL}2," "'.encode(), None): "labels line 2: '",
        (f"x,y\n{VAL}1,b\n{VAL}1,a".encode(), None): f"labels line 3: '{VAL}1' has a second label;",
        (f"{VAL}1,b\n{VAL}2,q 1".encode(), None): "labels line 2: 'q' is not a class folder",
        (f"{VAL}1,b\n{VAL}3,b".encode(), None): f"2 of the 4 pictures; val/{VAL}2.JPEG has none.",
        (b"", None): "labels is empty.",
        (b"\x93NUMPY\xff\xfe", None): "labels is not a text file in UTF-8",
        (b"MATLAB 5.0 MAT-file", None): "labels has 1 labels for 4 pictures",
    }
    for (text, numbers), words in wrong.items():
        write(labels, text)
        write(synsets, numbers or b"")
        with pytest.raises(UserError) as caught:
            pack_images(source, out, val_list=labels, synsets=None if numbers is None else synsets)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"--val-list .*nowhere cannot be read: No such file"):
        pack_images(source, out, val_list=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"only one of .* or name the classes .* with --val-list"):
        pack_images(source, out)
    with pytest.raises(UserError, match="give --val-list too"):
        pack_images(source, out, synsets=synsets)
    for other in (image_tree(tmp_path / "labelled", 1, 1), source / "train"):
        with pytest.raises(UserError, match=r"/val is not a folder of loose pictures; leave --val-list out"):
            pack_images(other, out, val_list=labels)
    assert not out.exists()


def test_too_many_rejected_ends_with_exit_code_1_and_a_table(tmp_path, capsys):
    for number in range(9):
        write(tmp_path / "source" / f"{number}.jpg", encoded(pixels(number)))
    write(tmp_path / "source/bad.jpg", b"")
    assert pack_images(tmp_path / "source", tmp_path / "out", max_reject=0.05) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "1 of 10 samples were rejected, more than --max-reject 5.00% allows" in out
    assert "to pretrain: make train-mae" in out  # the rest can be used
    assert "rejected: empty file" in out and "bad.jpg: empty file" in out
    assert pack_images(tmp_path / "source", tmp_path / "out", max_reject=0.1) == 0


def test_the_table_names_the_most_frequent_reasons_and_counts_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packing, "REASONS", 2)
    contents = {"empty": (b"", 4), "words": (b"text", 3), "gzip": (b"\x1f\x8b\x08" + bytes(50), 2)}
    contents |= {"PDF": (b"%PDF" + bytes(50), 1), "good": (encoded(pixels(1)), 1)}
    for name, (content, count) in contents.items():
        for number in range(count):
            write(tmp_path / "source" / f"{name} {number}.jpg", content)
    assert pack_images(tmp_path / "source", tmp_path / "out", max_reject=1.0, val_fraction=0.0) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "rejected: empty file 4 empty 0.jpg" in out and "rejected: not an image 3 words 0.jpg" in out
    assert "rejected: other reasons 3 gzip 0.jpg" in out and out.count("rejected: ") == 3


def test_rejected_files_are_listed_and_a_command_of_the_docs_lists_all(tmp_path, capsys):
    """The table names one file of each reason: the other damaged ones had to be searched."""
    for number in range(25):
        write(tmp_path / f"source/b/{number:02d}.jpg", b"text" if number else encoded(pixels(1)))
    write(tmp_path / "source/a/empty.jpg", b"")
    assert pack_images(tmp_path / "source", tmp_path / "out", val_fraction=0.3) == 1
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("the rejected samples:")
    shown = ["a/empty.jpg: empty file", *(f"b/{number:02d}.jpg: not an image" for number in range(1, 25))]
    assert lines[first + 1 : first + 21] == [f"  {line}" for line in shown[:20]]
    assert lines[first + 21].startswith("  and 5 more; docs/data.md has a command that lists all")
    (line,) = re.findall(r"^\.venv/bin/python (-c .*pyarrow.*)$", (ROOT / "docs/data.md").read_text(), re.M)
    command = f"{shlex.quote(sys.executable)} {line}".replace("shards/kinetics", str(tmp_path / "out"))
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert not done.stderr
    assert sorted(line.replace("\t", ": ") for line in done.stdout.splitlines()) == shown


def test_each_wrong_use_ends_with_one_line(tmp_path):
    good = image_tree(tmp_path / "good", train=1, val=1)
    clip_tree(tmp_path / "clips", CLIPS, frames=1)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "file", b"")
    write(tmp_path / "full/notes.txt", b"mine")
    write(tmp_path / "mixed/a.jpg", b"")
    write(tmp_path / "mixed/class/a.jpg", b"")
    write(tmp_path / "csv/frames/x/y.txt", b"")
    write(tmp_path / "csv/annotations/train.csv", b"label,youtube_id\nx,y\n")
    write(tmp_path / "absent/annotations/train.csv", b"label,youtube_id,time_start,time_end\nx,y,0,1\n")
    write(tmp_path / "absent/annotations/val.csv", b"label,youtube_id,time_start,time_end\nx,z,0,1\n")
    (tmp_path / "absent/frames").mkdir()
    write(tmp_path / "only val/val/n01/a.jpg", encoded(pixels(1)))
    out, empty = tmp_path / "out", tmp_path / "empty"
    wrong = {
        "--workers is 0; it must be at least 1": lambda: pack_images(good, out, workers=0),
        "--shard-size is 0; it must be at least 1": lambda: pack_images(good, out, shard_size=0),
        "--short-side is -5; it must be at least 1": lambda: pack_clips(
            tmp_path / "clips", out, short_side=-5
        ),
        "--val-fraction is 1.0; it must be": lambda: pack_images(good, out, val_fraction=1.0),
        "--max-reject is 2.0; it must be": lambda: pack_images(good, out, max_reject=2.0),
        "train": lambda: pack_images(tmp_path / "only val", out),
        "nowhere is not a folder": lambda: pack_images(tmp_path / "nowhere", out),
        "empty contains no pictures": lambda: pack_images(empty, out),
        "both class folders and loose pictures": lambda: pack_images(tmp_path / "mixed", out),
        "file: File exists": lambda: pack_images(good, tmp_path / "file"),
        "Not a directory": lambda: pack_images(good, tmp_path / "file/below"),
        "contains other files; give a new": lambda: pack_images(good, tmp_path / "full"),
        "frames is not a folder": lambda: pack_clips(tmp_path / "nowhere", out),
        "has no column 'time_start'": lambda: pack_clips(tmp_path / "csv", out),
        "has none of the annotated clips": lambda: pack_clips(tmp_path / "absent", out),
        "neither tiny_train.csv nor train.csv": lambda: pack.pack_clips(
            empty, out, ClipOptions(), frames=empty
        ),
    }
    for words, call in wrong.items():
        with pytest.raises(UserError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not out.exists(), "a wrong use leaves nothing behind"


def test_packing_without_data_explains_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"a does not exist; check IMAGES=, FRAMES= and VIDEOS="):
        pack.pack_all(ListOptions(), tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"(?s)nothing to pack.*ImageNet-1K.*data/imagenet.*make demo"):
        pack.pack_all(ListOptions())


def test_the_command_line_prints_the_error_and_exits_with_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: pack_images(tmp_path / "nowhere", tmp_path / "out"))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --source {tmp_path}/nowhere is not a folder")
    run = [sys.executable, "-m", "tools.pack", "images", "--sauce", "x"]
    wrong = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "--sauce" in wrong.stderr and "Traceback" not in wrong.stderr
