"""The promises of docs/security.md: files of others run nothing, escape from no folder, fill no memory."""

import csv
import json
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from models.files import read_weights
from models.zoo import create
from pipelines.dataset import SCHEMA, open_dataset
from pipelines.errors import UserError, printable, run_cli
from pipelines.files import atomic_text, sha256_of
from tests.pipelines_fixtures import image_dataset, read_rows
from tools import lists
from tools.convert import convert
from tools.folders import PICTURES
from tools.images import BadImage
from tools.pack import ClipOptions
from tools.predict import write_table
from tools.report import report
from tools.samples import read_annotations
from tools.videos import FORMATS, load_video
from train import checkpoint, replay
from train.config import to_dict
from train.evaluate import read_config
from train.presets import FINETUNE_PRESETS, MAE_PRESETS
from train.rundir import Run, data_of

MODEL = "hiera_pico_96"


def peak() -> int:
    """The largest resident size of this process since `small_memory` began, in MiB."""
    return int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0]) >> 10


@pytest.fixture
def small_memory():
    """Fail unless the test adds less than 300 MiB to the resident size."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present size
    before = peak()
    yield
    assert peak() - before < 300


def state() -> dict[str, torch.Tensor]:
    return create(MODEL, num_classes=2).state_dict()


# ---- weights and checkpoints -----------------------------------------------------------------------------


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def compressed(path: Path) -> None:
    """A PyTorch file of some kB with 64 MB of content."""
    torch.save({"x": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in parts.items():
            with archive.open(name, "w", force_zip64=True) as file:
                for _ in range(64 if name.endswith("data/0") else 0):
                    file.write(bytes(1 << 20))
                file.write(data)


def bytes_of_length(path: Path) -> None:
    path.write_bytes(
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + (1 << 31).to_bytes(5, "little") + b"\x85R."
    )


def padded(path: Path) -> None:
    """A compressed pickle that allocates, in a file that is as large as its content."""
    bytes_of_length(path)
    pickled = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled, zipfile.ZIP_DEFLATED)
        archive.writestr("a/version", b"3\n")
        archive.writestr("a/padding", bytes(1000))


def of_shape(path: Path) -> None:
    """A tensor of 256 MiB without values: the pickle has only its shape."""
    with zipfile.ZipFile(path, "w") as archive:
        call = b"ctorch\nTensor\n\x8a\x05" + (1 << 26).to_bytes(5, "little") + b"\x85R"
        archive.writestr("a/data.pkl", b"\x80\x02}X\x0b\0\0\0norm.weight" + call + b"s.")
        archive.writestr("a/version", b"3\n")


def expanded(path: Path) -> None:
    torch.save(state() | {"norm.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)


def without_values(path: Path) -> None:
    torch.save(state() | {"norm.weight": torch.empty(384, device="meta")}, path)


def sparse(path: Path) -> None:
    where = torch.zeros(2, 1, dtype=torch.long)
    torch.save(
        state() | {"norm.weight": torch.sparse_coo_tensor(where, torch.ones(1), (1 << 20, 1 << 20))}, path
    )


@pytest.mark.filterwarnings("ignore:.*parse")
@pytest.mark.parametrize(
    "make", [compressed, bytes_of_length, padded, of_shape, expanded, without_values, sparse]
)
def test_weights_take_no_more_memory_than_their_file(make: Callable, small_memory: None, tmp_path: Path):
    make(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"takes more memory than its size|does not store every value"):
        read_weights(tmp_path / "a.pth")
    with pytest.raises(UserError):
        convert(str(tmp_path / "a.pth"), tmp_path / "b.safetensors", to="timm")
    assert not (tmp_path / "b.safetensors").exists()


def test_a_header_of_weights_cannot_claim_memory(small_memory: None, tmp_path: Path):
    huge = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    for data in (
        (1 << 62).to_bytes(8, "little") + b'{"a"',
        (99_000_000).to_bytes(8, "little") + b'{"a":' + b"[" * 100_000,
        (100_005).to_bytes(8, "little") + b'{"a":' + b"[" * 100_000,
        len(huge).to_bytes(8, "little") + huge + bytes(100),
    ):
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(UserError):
            read_weights(tmp_path / "a.safetensors")


def test_the_code_in_a_checkpoint_does_not_run(small_memory: None, tmp_path: Path):
    torch.save({"step": 1, "evil": Evil(tmp_path / "ran")}, tmp_path / "step-1.pt")
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(tmp_path / "step-1.pt", torch.device("cpu"))
    bytes_of_length(tmp_path / "step-1.pt")
    with pytest.raises(UserError, match="takes more memory"):
        checkpoint.load(tmp_path / "step-1.pt", torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_the_json_files_of_a_transformers_folder_are_only_data(tmp_path: Path):
    save_file(state(), tmp_path / "model.safetensors")
    for config in (
        '{"auto_map": {"AutoModel": "evil.Model"}, "id2label": {"0": "a", "1": "b"}}',
        '{"id2label": {"%s": "a"}}' % ("9" * 5000),
        "[" * 100_000,
    ):
        (tmp_path / "evil.py").write_text("import os; os.mkdir('ran')")
        (tmp_path / "config.json").write_text(config)
        assert len(read_weights(tmp_path).state) == len(state())
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": ["x"]}}')
    with pytest.raises(UserError, match="must be in its own folder"):
        read_weights(tmp_path)


# ---- run folders -----------------------------------------------------------------------------------------


CONFIGS = {  # of config.json: the setting to change, or the whole text
    "text": [
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"kind": "os.system"}',
        '{"kind": []}',
        '{"kind": "mae", "data": 5}',
    ],
    "data.size": [100_000, 1e300, 64.0, "x", -1, float("nan"), None, [1]],
    "data.frames": [1 << 40, "__import__('os')"],
    "data.path": [5, None],
    "run.name": ["../../x", "/x", "a/../b", 5],
    "speed.profile": ["__import__('os')"],
}


def test_a_configuration_is_checked_before_it_is_used(small_memory: None, tmp_path: Path):
    for name, values in CONFIGS.items():
        for value in values:
            settings = to_dict(FINETUNE_PRESETS["image-ft-pico"])
            if name != "text":
                group, _, key = name.partition(".")
                settings[group][key] = value
            (tmp_path / "config.json").write_text(str(value) if name == "text" else json.dumps(settings))
            with pytest.raises(UserError, match=r"config\.json is not a configuration"):
                read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "5", "[" * 100_000])
def test_a_damaged_record_of_the_data_is_named(tmp_path: Path, text: str):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=r"data\.json cannot be read"):
        data_of(tmp_path)


def test_links_in_a_folder_do_not_lead_a_write_outside(tmp_path: Path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.write_text("mine")
    names = "report.html", f".report.html.tmp-{os.getpid()}", ".heartbeat.tmp", "heartbeat.json"
    for name in names:
        (run / name).symlink_to(other)
    (run / "config.json").write_text(json.dumps(to_dict(MAE_PRESETS["image-mae-pico"])))
    report(run)
    with (run / "held").open("w") as held:
        Run(None, run, lock=held).beat({"step": 1})  # pyrefly: ignore
    atomic_text(run / "a.txt", "text")
    assert other.read_text() == "mine" and not (run / "report.html").is_symlink()
    assert json.loads((run / "heartbeat.json").read_text())["step"] == 1


HOSTILE = "</td><script>x()</script><img src=x onerror=x()>\" onload='x()' &lt;$a_b$[link=http://x]\x1b]52;c;eA==\x07"


class Tags(HTMLParser):
    """Collects the elements of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def hostile_run(folder: Path) -> Path:
    """A run folder with hostile text in every file that the report shows."""
    folder.mkdir()
    config = FINETUNE_PRESETS["image-ft-pico"]
    settings = to_dict(replace(config, data=replace(config.data, path=Path(HOSTILE))))
    settings["model"] |= {"init": HOSTILE, "name": HOSTILE}
    split = {"samples": 2, HOSTILE: HOSTILE}
    files = {
        "config.json": settings,
        "env.json": [
            {"command": HOSTILE, HOSTILE: HOSTILE, "gpus": [HOSTILE], "cpus": HOSTILE, "processes": 1}
        ],
        "data.json": {
            "classes": [HOSTILE, "b"],
            "splits": {HOSTILE: split, "train": split},
            "sha256": HOSTILE,
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    (folder / "log.txt").write_text(f"{HOSTILE}\n")
    (folder / "model_card.md").write_text(f"```python\n{HOSTILE}\n```")
    heading = f'step,time,samples_per_s,step_ms,data_wait_ms,"{HOSTILE.replace(chr(34), chr(34) * 2)}"\n'
    (folder / "metrics.csv").write_text(heading + "1,1.0,1,1,0,1\n2,2.0,1,1,0,1\n")
    table = {"id": [0, 1], "source": [HOSTILE, "b"], "label": [0, 1], "class_1": ["b", HOSTILE]}
    pq.write_table(pa.table(table | {"probability_1": [0.9, 0.8]}), folder / "predictions.parquet")
    return folder


@pytest.mark.filterwarnings("ignore:Glyph")
def test_text_in_a_run_folder_stays_text_in_the_report(tmp_path: Path):
    runs = [hostile_run(tmp_path / name) for name in ("<script>", 'a" onload="x()')]
    both = report(*runs, out=tmp_path / "both.html")
    (runs[0] / "metrics.csv").unlink()  # drawing its curves once is enough
    for page in (both, report(runs[0])):
        tags = Tags()
        tags.feed(page.read_text())
        assert {tag for tag, _ in tags.found} & {
            "script",
            "iframe",
            "object",
            "embed",
            "form",
            "base",
        } == set()
        for tag, values in tags.found:
            assert not any(name.startswith("on") for name in values), (tag, values)
            for name in ("src", "href", "xlink:href", "action"):
                assert (values.get(name) or "#").startswith(("#", "data:image/")), (tag, values)
        assert page.read_text().count("onerror=x()") > 20  # all of it, as text


# ---- data ------------------------------------------------------------------------------------------------


def test_a_compressed_catalogue_is_refused(small_memory: None, tmp_path: Path):
    root = image_dataset(tmp_path / "data", 4)
    rows = [row | {"reason": "x" * 50_000_000} for row in read_rows(root)]
    batch = pa.RecordBatch.from_pylist(rows[:1], SCHEMA)
    for codec in ("zstd", "lz4"):
        options = pa.ipc.IpcWriteOptions(compression=codec)
        with pa.ipc.new_file(str(root / "train.arrow"), SCHEMA, options=options) as writer:
            writer.write_batch(batch)
        info = json.loads((root / "dataset.json").read_text())
        info["catalogue_sha256"]["train"] = sha256_of(root / "train.arrow")
        (root / "dataset.json").write_text(json.dumps(info))
        with pytest.raises(UserError, match="it is compressed"):
            open_dataset(root, "train")


def video(path: Path) -> None:
    """A frame of 320 x 240 pixels."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuvj420p"
        for packet in (*stream.encode(av.VideoFrame(320, 240, "yuvj420p")), *stream.encode()):
            container.mux(packet)


def test_the_frames_of_a_video_have_at_most_max_pixels(small_memory: None, tmp_path: Path):
    video(tmp_path / "a.avi")
    whole = (tmp_path / "a.avi").read_bytes()
    packing = ClipOptions(workers=1).packing(videos=True)
    assert len(list(load_video(tmp_path, "a.avi", packing))) == 1
    with pytest.raises(BadImage, match="more than --max-pixels 1000"):
        list(load_video(tmp_path, "a.avi", replace(packing, max_pixels=1000)))
    frame = whole.index(b"\xff\xc0") + 5  # the size in the frame's own header
    huge = struct.pack(">HH", 16_000, 16_000)
    (tmp_path / "a.avi").write_bytes(whole[:frame] + huge + whole[frame + 4 :])
    with pytest.raises(BadImage):
        list(load_video(tmp_path, "a.avi", packing))


def test_a_playlist_opens_no_other_file(tmp_path: Path):
    secret = tmp_path / "secret.avi"
    video(secret)
    packing = ClipOptions(workers=1).packing(videos=True)
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {secret.name}\n",
        f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{secret}</BaseURL></MPD>',
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    ):
        (tmp_path / "a.mp4").write_text(text)
        with pytest.raises(BadImage, match="not a video"):
            list(load_video(tmp_path, "a.mp4", packing))
    others = {"hls", "concat", "dash", "sdp", "rtsp", "rtp", "image2", "lavfi", "tedcaptions", "applehttp"}
    assert not others & {*FORMATS.split(",")}


def test_a_list_names_no_folder_outside(tmp_path: Path):
    for label, video in (("..", "x"), ("a", ".."), ("a/b", "x"), ("", "x"), (".", "x")):
        text = f"label,youtube_id,time_start,time_end\n{label},{video},0,10\n"
        (tmp_path / "train.csv").write_text(text)
        with pytest.raises(UserError, match="cannot name a folder"):
            read_annotations(tmp_path / "train.csv")
    (tmp_path / "train.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a JSON file"):
        lists.parse(tmp_path / "train.json", "[" * 100_000, lambda _: ["a"])
    index = lists.Index(["a/x.jpg"], PICTURES)
    assert [index.find(name) for name in ("../x.jpg", "/etc/passwd", "a/../../x.jpg", "..")] == [[]] * 4


# ---- names -----------------------------------------------------------------------------------------------


def test_names_cannot_control_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["x"])

    def main() -> None:
        print("name \x1b]52;c;eA==\x07 \x1b]0;title\x07 \x1b[6n \x1b[c \x1bc \x9b6n \x1b[31mred\x1b[0m")
        raise UserError("no file \x1b]8;;http://x\x1b\\; check it")

    with pytest.raises(SystemExit):
        run_cli(main)
    out, err = capsys.readouterr()
    assert set(re.findall(r"\x1b.{0,3}", out)) == {"\x1b[31", "\x1b[0m"} and "\x1b" not in err
    assert r"\x1b]52;c;eA==\x07" in out and not re.search(r"[\x07\x9b]", out)
    assert printable("b\udce4r") == r"b\udce4r"
    assert printable("a\tb\n\u00e9 \u4e2d") == "a\tb\n\u00e9 \u4e2d"


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str]):
    row = {"epoch": 0, "id": 0, "loss": 1.0, "source": "a[/b] [link=http://x]:smile:"}
    found = {
        "step": 1,
        "rows": [row],
        "gradient_norms": {"[/x]": 1.0},
        "loss": 1.0,
        "skipped": 0,
        "layers": [],
    }
    replay.show(found | {"rows_compared": 0, "first": None})
    assert "a[/b] [link=http://x]:smile:" in capsys.readouterr().out


def test_names_in_a_table_are_unchanged(tmp_path: Path):
    names = ['=cmd|" /C calc"!A1', "+1", "a,b", 'a"b']
    for name in ("a.csv", "a.json", "a.parquet"):
        write_table(tmp_path / name, names, [[(label, 0.5)] for label in names], [""] * 4, top=1)
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [row["class_1"] for row in csv.DictReader(file)] == names
    assert [row["input"] for row in json.loads((tmp_path / "a.json").read_text())] == names
    assert pq.read_table(tmp_path / "a.parquet")["class_1"].to_pylist() == names
