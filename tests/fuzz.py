"""Feeds damaged and hostile files to every reader of files: python -m tests.fuzz --minutes 10

A reader may take what it gets or raise UserError; any other exception, a hang, a crash or unbounded memory is
a finding. Case `seed` of a reader is always the same: --only READER --seed N runs that one alone.
"""

import argparse
import copy
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from models.files import read_weights
from pipelines.dataset import SCHEMA, check_shards, missing_shards, open_dataset, read_info
from pipelines.errors import UserError
from pipelines.files import sha256_of
from tests.pipelines_fixtures import read_rows
from tests.train_helpers import make_clips, picture
from tools.folders import VIDEOS
from tools.images import BadImage, prepare
from tools.pack import ClipOptions
from tools.report import _data
from tools.results import results
from tools.samples import flat_classes, list_samples, read_annotations
from tools.tars import TarOptions, pack_tars
from tools.verify import check_shard, verify
from tools.videos import load_video
from train import rundir
from train.config import to_dict
from train.evaluate import read_config
from train.metrics import read_csv
from train.presets import FINETUNE_PRESETS

SECONDS = 20  # a case may take, on a machine that does other things too
MEMORY = 6 << 30  # bytes of address space
NUMBERS = (-1, 0, 1, 2, 65_536, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63, -(2**63), 10**30, 0.5, 1e300, True)
STRINGS = ("", "../../x", "/etc/passwd", "\0", "\ud800", "é", "nan", "x" * 70_000, "\x1b[2J", "%s", "a,b\n")
TOKENS = [
    str(n).encode() for n in (*NUMBERS, "1e999", "NaN", "null", "[]", "{}", '"', ",", "\n", "\r", "n01")
]
TOKENS += [s.encode("utf-8", "surrogatepass") for s in STRINGS] + [b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 5000]

Random = random.Random
Mutate = Callable[[Random, bytes], bytes]


def bytes_of(rng: Random, data: bytes) -> bytes:
    """Flip, cut, repeat, move and insert a few times."""
    text = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        kind = rng.randrange(6)
        if kind == 0 and text:
            text[at % len(text)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del text[at : min(to, at + rng.choice((1, 8, 1000)))]
        elif kind == 2:
            text[at:at] = text[at : at + rng.randrange(1, 200)]
        elif kind == 3:
            text[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(TOKENS)
        elif kind == 4:
            text[at : at + 8] = rng.randbytes(8)
        elif rng.randrange(4) == 0:
            del text[at:]
    return bytes(text)


def tar_of(rng: Random, data: bytes) -> bytes:
    """Change fields of a few headers of a tar; their checksums are correct."""
    text = bytearray(data)
    starts = [at for at in range(0, len(text), 512) if text[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.choice(starts), rng.randrange(4)
        if kind == 0:
            size = max(-(2**87), min(int(rng.choice([n for n in NUMBERS if n != 1e300])), 2**87))
            text[at + 124 : at + 136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # pyrefly: ignore
        elif kind == 1:
            text[at + 156] = rng.choice(b"0123456 7xgLKSDVNAX\0")
        elif kind == 2:
            text[at : at + 100] = rng.choice(STRINGS).encode("utf-8", "surrogatepass")[:100].ljust(100, b"\0")
        else:
            field = rng.choice((0, 124, 157, 257, 345, 386, 482))
            text[at + field : at + field + 8] = rng.randbytes(8)
        total = sum(text[at : at + 148]) + 8 * 32 + sum(text[at + 156 : at + 512])
        text[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(text)


def value_of(rng: Random, old: object) -> object:
    """Something that may stand where `old` did."""
    near = [old + step for step in (-1, 1, 512)] if isinstance(old, int) else []
    listed = [old * 2, old[1:], [old]] if isinstance(old, list) else []
    return rng.choice(
        [*NUMBERS, *STRINGS, None, [], {}, [0], ["a", "a"], {"train": 1}, *near * 4, *listed * 4]
    )


def json_of(rng: Random, data: bytes) -> bytes:
    """Change a few values or names anywhere in the tree."""
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        places: list[tuple[dict | list, str | int]] = []
        todo = [tree]
        for node in todo:
            keys = node.keys() if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            todo += [node[key] for key in keys if isinstance(node[key], dict | list)]
        if not places:
            break  # a change before has left nothing
        node, key = rng.choice(places)
        if isinstance(node, dict) and rng.randrange(3) == 0:
            value = node.pop(key)
            node.update({rng.choice(STRINGS): value} if rng.randrange(2) else {})
        else:
            node[key] = copy.deepcopy(value_of(rng, node[key]))  # pyrefly: ignore
    return json.dumps(tree, ensure_ascii=rng.randrange(2) == 0).encode("utf-8", "surrogatepass")


def rows_of(rng: Random, data: bytes) -> bytes:
    """An Arrow file that is right, with values that may not be."""
    rows = pa.ipc.open_file(pa.BufferReader(data)).read_all().to_pylist()
    for _ in range(rng.choice((1, 1, 2, 4))):
        row, name = rng.choice(rows), rng.choice(SCHEMA.names)
        if isinstance(row[name], list) and row[name] and rng.randrange(2):
            row[name][rng.randrange(len(row[name]))] = value_of(rng, row[name][0])
        else:
            row[name] = value_of(rng, row[name])
    names = rng.sample(SCHEMA.names, len(SCHEMA.names)) if rng.randrange(8) == 0 else SCHEMA.names
    names = names[: -rng.randrange(1, 4)] if rng.randrange(8) == 0 else names
    schema = SCHEMA if rng.randrange(4) else None
    try:
        fields = [pa.array([row[n] for row in rows], schema and schema.field(n).type) for n in names]
        table = pa.table(dict(zip(names, fields, strict=True)))
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return bytes_of(rng, data)  # no column can hold such values
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rng.choice((1, 3, 1000, 1000)))
    return sink.getvalue().to_pybytes()


# ---- readers: (what is damaged, how, what reads it) ------------------------------------------------------


def use(root: Path) -> None:
    """Everything that training does with a catalogue before it decodes."""
    info = read_info(root)
    check_shards(info)
    for split in info.splits:
        catalogue = open_dataset(root, split)
        for sample in range(len(catalogue)):
            count = int(catalogue.frame_counts(np.array([sample]))[0])
            assert count < 100_000
            catalogue.read(np.array([sample]), np.arange(count)[None])
            catalogue.will_need(np.array([sample]), np.arange(count)[None])
            assert catalogue.member_name(sample, 0).isprintable()


def check(root: Path) -> None:
    """tools.verify of a shard: every change in its tar or index is a fault."""
    rows = read_rows(root)
    tar = root / "train/000000.tar"
    whole = hashlib.sha256(tar.read_bytes() + tar.with_suffix(".idx").read_bytes()).hexdigest()
    changed = whole != (root / "whole").read_text()
    info = read_info(root)
    faults = [*check_shard(info, tar, rows), *missing_shards(info, "train")]
    assert bool(faults) == changed


def labels(root: Path) -> None:
    pictures, classes, refused = ["val/a.jpg", "val/b.jpg"], {"n01", "n02"}, []
    for path, synsets in (("labels.txt", None), ("classes.txt", None), ("numbers.txt", "classes.txt")):
        try:
            found = flat_classes(root / path, synsets and root / synsets, pictures, classes)
            assert len(found) == 2 and set(found) <= classes
        except UserError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def annotations(root: Path) -> None:
    for clip in read_annotations(root / "train.csv"):
        assert "/" not in clip.name() and clip.name() not in (".", "..")


def lists(root: Path) -> None:
    """A list in one of several formats; the JSON one is of Something-Something v2."""
    refused = []
    for name in LISTS:
        try:
            listing = list_samples(root / "videos", VIDEOS, root / name, None, None)
            assert listing.train
            for item in listing.train:
                assert not Path(item.source).is_absolute() and "\0" not in item.source
        except UserError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def pictures(root: Path) -> None:
    """What packing makes of a picture is a JPEG that decodes."""
    refused = []
    for path in (root / "pictures").iterdir():
        try:
            packed = prepare(path.read_bytes(), 16, 1_000_000)
            with Image.open(io.BytesIO(packed.frames[0])) as made:
                made.load()
                assert made.format == "JPEG" and made.size == packed.size and min(made.size) <= 16
        except BadImage as error:
            refused.append(error)
    if refused:
        raise UserError(str(refused[0]))


def videos(root: Path) -> None:
    packing = ClipOptions(short_side=16, max_pixels=1_000_000).packing(videos=True)
    refused = []
    for path in (root / "films").iterdir():
        try:
            for part in load_video(path.parent, path.name, packing):
                assert isinstance(part, BadImage) or all(part.frames)
        except BadImage as error:
            refused.append(error)
    if refused:
        raise UserError(str(refused[0]))


def predictions(root: Path) -> None:
    """A section of the report, which is left out if its file cannot be read."""
    found, left_out = _data("Results", "predictions.parquet", results, [root / "run"], False)
    if not found:
        raise UserError(left_out[0])


def weights(root: Path) -> None:
    for name in ("weights.safetensors", "weights.pth"):
        read_weights(root / name)


def run_folder(root: Path) -> None:
    """What evaluate, report and predict read of a run before its weights."""
    read_config(root / "run")
    rundir.check_classes(root / "run", read_info(root))
    read_csv(root / "run/metrics.csv")


def foreign(root: Path) -> None:
    """What `tools.pack tars` accepts, `tools.verify` accepts too."""
    shutil.rmtree(root / "out", ignore_errors=True)
    pack_tars(str(root / "foreign.tar"), TarOptions(workers=1, max_reject=1.0), out=root / "out")
    assert verify(root / "out") == 0


def foreign_tar(path: Path) -> None:
    """A tar with plain, pax and GNU headers, as another program may write it."""
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            tar.format = tarfile.PAX_FORMAT if number % 2 else tarfile.GNU_FORMAT
            key = f"{'n' * (120 * (number > 1))}/{number}"
            for suffix, data in (("jpg", picture(number % 2, number, 24)), ("cls", b"%d" % (number % 2))):
                header = tarfile.TarInfo(f"{key}.{suffix}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


KINDS = ("jpeg", "png", "gif", "bmp", "tiff", "webp", "ppm")
LISTS = ("list.txt", "list.csv", "rawframes.txt", "list.json")
READERS: dict[str, tuple[tuple[str, ...], tuple[Mutate, ...], Callable[[Path], object]]] = {
    "dataset": (("dataset.json",), (bytes_of, json_of, json_of), use),
    "catalogue": (("train.arrow",), (bytes_of, rows_of, rows_of), use),
    "verify": (("dataset.json", "train.arrow"), (bytes_of,), verify),
    "index": (("train/000000.idx", "train/000000.tar"), (bytes_of,), check),
    "tars": (("foreign.tar",), (bytes_of, tar_of, tar_of), foreign),
    "labels": (("labels.txt", "classes.txt", "numbers.txt"), (bytes_of,), labels),
    "annotations": (("train.csv",), (bytes_of,), annotations),
    "lists": (LISTS, (bytes_of,), lists),
    "json list": (("list.json",), (bytes_of, json_of, json_of), lists),
    "weights": (("weights.safetensors", "weights.pth"), (bytes_of,), weights),
    "run": (("run/config.json", "run/data.json"), (bytes_of, json_of, json_of), run_folder),
    "metrics": (("run/metrics.csv",), (bytes_of,), run_folder),
    "pictures": (tuple(f"pictures/a.{kind}" for kind in KINDS), (bytes_of,), pictures),
    "videos": (("films/a.mp4", "films/a.avi"), (bytes_of,), videos),
    "predictions": (("run/predictions.parquet",), (bytes_of,), predictions),
}


def make(root: Path) -> Path:
    """What the readers read, undamaged; gives its folder."""
    good = make_clips(root, train=2, val=1, frames=3)
    (good / "train.csv").write_text('label,youtube_id,time_start,time_end\na b,x-1,0,10\n"c,d",y,3,13\n')
    (good / "labels.txt").write_text("ImageId,PredictionString\na,n01 1 2 3 4\nb,n02 1 2 3 4\n")
    (good / "classes.txt").write_text("n01\nn02\n")
    (good / "numbers.txt").write_text("2\n1\n")
    shard = (good / "train/000000.tar").read_bytes() + (good / "train/000000.idx").read_bytes()
    foreign_tar(good / "foreign.tar")
    (good / "list.txt").write_text("a/1.mp4 0\n./b/2.mp4 1\n/other/machine/videos/b/3.mp4 1\n")
    (good / "list.csv").write_text("path,label,length\na/1.mp4,cat,3\nb/2,dog,4\n")
    (good / "rawframes.txt").write_text("a/1 30 0\nb/2 28 1\n")
    (good / "list.json").write_text('[{"id": "1", "template": "put [a] b"}, {"id": "2", "template": "c"}]')
    for name in ("a/1.mp4", "b/2.mp4", "b/3.mp4"):
        (good / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (good / "videos" / name).touch()
    tensors = {"a.weight": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, good / "weights.safetensors", metadata={"classes": '["a", "b"]'})
    torch.save({"model": tensors, "epoch": 3}, good / "weights.pth")
    run = good / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_dict(FINETUNE_PRESETS["image-ft-pico"])))
    (run / "data.json").write_text(json.dumps({"classes": list(read_info(good).classes)}))
    (run / "metrics.csv").write_text("step,loss,acc\n1,2.5,\n2,nan,0.5\n")
    for kind in KINDS:
        (good / "pictures").mkdir(exist_ok=True)
        Image.open(io.BytesIO(picture(0, 0, 24))).save(good / f"pictures/a.{kind}")
    (good / "films").mkdir()
    for suffix in ("mp4", "avi"):
        with av.open(str(good / f"films/a.{suffix}"), "w") as film:
            stream = film.add_stream("mpeg4", rate=30)
            stream.width = stream.height = 32
            for number in range(6):
                frame = np.full((32, 32, 3), 40 * number, np.uint8)
                film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            film.mux(stream.encode())
    names, count = read_info(good).classes, 2
    columns = {"id": range(count), "source": ["a", "b"], "label": [0, 1], "class_1": [names[0]] * count}
    table = pa.table({**{k: list(v) for k, v in columns.items()}, "probability_1": [0.9, 0.8]})
    pq.write_table(table, run / "predictions.parquet")
    (good / "whole").write_text(hashlib.sha256(shard).hexdigest())
    return good


# ---- running ---------------------------------------------------------------------------------------------


def one(name: str, seed: int, good: Path, folder: Path) -> str:
    """Run a case in `folder`, a copy of `good`: "taken" or "refused"."""
    rng = random.Random(f"{name} {seed}")
    files, mutations, read = READERS[name]
    path = rng.choice(files)
    (folder / path).write_bytes(rng.choice(mutations)(rng, (good / path).read_bytes()))
    if path.endswith(".arrow") and rng.randrange(4):  # else its checksum alone refuses it
        info = json.loads((good / "dataset.json").read_text())
        info["catalogue_sha256"]["train"] = sha256_of(folder / path)
        (folder / "dataset.json").write_text(json.dumps(info))
    try:
        read(folder)
        return "taken"
    except UserError:
        return "refused"
    finally:
        for name in {path, "dataset.json"}:
            shutil.copyfile(good / name, folder / name)


def work(name: str, good: Path, first: int, until: float, told: Connection) -> None:
    """Run cases from `first` on in a process of their own; tell each before it starts, and how it ended."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        sys.stdout = sys.stderr = nowhere  # verify prints what it finds
        copied = Path(shutil.copytree(good, Path(folder) / "data"))
        for seed in itertools.count(first):
            if time.monotonic() > until:
                return
            told.send((seed, ""))
            signal.alarm(SECONDS)
            try:
                told.send((seed, one(name, seed, good, copied)))
            except Exception:
                told.send((seed, traceback.format_exc(limit=-3)))
            signal.alarm(0)


def fuzz(name: str, good: Path, seconds: float, seed: int) -> tuple[Counter[str], list[str]]:
    """How many cases ended how, and the findings."""
    until, counts, findings = time.monotonic() + seconds, Counter(), []
    while time.monotonic() < until:
        told, teller = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=work, args=(name, good, seed, until, teller), daemon=True)
        process.start()
        teller.close()
        try:
            while told.poll(3 * SECONDS):
                seed, outcome = told.recv()
                if outcome in ("taken", "refused"):
                    counts[outcome] += 1
                elif outcome:
                    findings.append(f"--only {name} --seed {seed}: {outcome}")
            findings.append(f"--only {name} --seed {seed}: hangs")
            process.kill()
        except EOFError:
            process.join()
            if process.exitcode:
                findings.append(f"--only {name} --seed {seed}: the process ended with {process.exitcode}")
        seed += 1
    return counts, findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for each reader")
    parser.add_argument("--only", choices=READERS, nargs="*", default=list(READERS))
    parser.add_argument("--seed", type=int, help="run one case here and show what comes of it")
    options = parser.parse_args()
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        good = make(Path(folder))
        if options.seed is not None:
            copied = Path(shutil.copytree(good, Path(folder) / "copied"))
            print(one(options.only[0], options.seed, good, copied))
            return
        for name in options.only:
            counts, findings = fuzz(name, good, 60 * options.minutes, 0)
            shown = {finding.rpartition("\n")[0][-200:]: finding for finding in findings}  # one of each place
            print(f"{name}: {dict(counts)}, {len(findings)} findings", *shown.values(), sep="\n", flush=True)
            found += len(findings)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
