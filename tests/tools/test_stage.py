"""Copying a dataset to a local disk, from folders and from S3: complete, checked, and resumed."""

import http.server
import json
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pipelines.dataset import open_dataset
from pipelines.errors import UserError
from pipelines.files import sha256_of
from tests.pipelines_fixtures import image_dataset, keys_of
from tests.tools.test_pack import encoded, pack_images, pixels, write
from tests.train_helpers import ROOT, make_clips, make_images, module
from tools import stage
from tools.verify import verify


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return make_clips(tmp_path_factory.mktemp("clips"))


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_copy_is_complete_and_a_second_run_copies_nothing(clips, tmp_path, capsys):
    stage.stage(str(clips), tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(clips)
    assert verify(tmp_path / "copy") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").rglob("*.tar")}
    capsys.readouterr()
    stage.stage(f"{clips}/", tmp_path / "copy")
    assert "copied 0 MB in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


class Store(http.server.BaseHTTPRequestHandler):
    """As much of S3 as reading objects takes; every `fail_every`-th request is refused."""

    root = Path()
    asked, fail_every = 0, 7

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        Store.asked += 1
        path = self.root / self.path.partition("?")[0].removeprefix("/bucket/")
        if Store.asked % self.fail_every == 0:
            return self.reply(503, b"", body)
        if not path.is_file():
            return self.reply(404, b"", body)
        data = path.read_bytes()
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1]
            return self.reply(206, part, body, f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.reply(200, data, body)

    def reply(self, code: int, data: bytes, body: bool, content_range: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_shards_come_from_an_s3_compatible_store(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    Store.root = clips
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"endpoint_override=127.0.0.1:{server.server_address[1]}&scheme=http&region=us-east-1"
        stage.stage(f"s3://bucket?{where}", tmp_path / "copy", workers=3)
        assert contents(tmp_path / "copy") == contents(clips)
        with pytest.raises(UserError, match=r"nothing/dataset\.json does not exist"):
            stage.stage(f"s3://bucket/nothing?{where}", tmp_path / "other")
        server.shutdown()
    assert Store.asked > Store.fail_every


def test_a_damaged_shard_is_never_renamed_into_place(tmp_path, monkeypatch):
    monkeypatch.setattr(stage.time, "sleep", lambda _: None)
    source = make_images(tmp_path, train=10)
    catalogue = open_dataset(source, "train")
    with (source / "train/000001.tar").open("r+b") as file:
        file.seek(int(catalogue.offset[18]) + 400)
        file.write(b"??")
    key = keys_of(catalogue)[18]
    with pytest.raises(
        UserError, match=rf"000001\.tar could not be copied.*the checksum of sample {key} differs"
    ):
        stage.stage(str(source), tmp_path / "copy")
    assert not (tmp_path / "copy/train/000001.tar").exists()
    assert not (tmp_path / "copy/dataset.json").exists()


def test_after_a_kill_the_same_command_continues(tmp_path):
    source = make_images(tmp_path, train=150, val=10)
    copy = tmp_path / "copy"
    kills = 0
    for _ in range(30):
        before = len(list(copy.rglob("*.tar")))
        command = module("tools.stage", str(source), str(copy), "--workers", "1")
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and len(list(copy.rglob("*.tar"))) <= before:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not (copy / "dataset.json").exists():
            kills += 1
        else:  # too late: once more from the start
            shutil.rmtree(copy)
        if kills == 2:
            break
    assert kills == 2
    stage.stage(str(source), copy)
    assert contents(copy) == contents(source)


def test_an_interrupted_copy_of_another_dataset_is_not_kept(tmp_path):
    copy, lengths = tmp_path / "copy", []
    for seed in (0, 100):
        source, packed = tmp_path / f"source{seed}", tmp_path / f"packed{seed}"
        for number in range(10):
            write(source / f"{number}.jpg", encoded(pixels(seed + number)))
        assert pack_images(source, packed) == 0
        lengths.append(json.loads((packed / "dataset.json").read_text())["tar_bytes"])
        stage.stage(str(packed), copy)
        if seed == 0:  # as a command leaves it that is killed before its last step
            (copy / ".staging").mkdir()
            (copy / "dataset.json").rename(copy / ".staging/dataset.json")
    assert lengths[0] == lengths[1], "only the lengths of the tars are compared otherwise"
    assert contents(copy) == contents(packed) and verify(copy) == 0


def test_wrong_use_ends_with_one_line(clips, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"dataset\.json does not exist"):
        stage.stage(str(tmp_path), tmp_path / "copy")
    with pytest.raises(UserError, match="ftp://x cannot be opened"):
        stage.stage("ftp://x", tmp_path / "copy")
    other = image_dataset(tmp_path / "other")
    with pytest.raises(UserError, match="contains a different dataset"):
        stage.stage(str(clips), other)
    full = stage.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match=r"0\.0 GB free and train needs"):
        stage.stage(str(clips), tmp_path / "copy")


def test_a_second_run_copies_a_catalogue_only_when_it_differs(tmp_path, monkeypatch, capsys):
    source, copy = make_images(tmp_path, train=10), tmp_path / "copy"
    stage.stage(str(source), copy)
    info = json.loads((source / "dataset.json").read_text())
    assert info["catalogue_sha256"] == {s: sha256_of(source / f"{s}.arrow") for s in ("train", "val")}
    fetched: list[str] = []
    fetch = stage.fetch
    monkeypatch.setattr(
        stage, "fetch", lambda store, path, *a: fetched.append(path) or fetch(store, path, *a)
    )
    stage.stage(str(source), copy)
    assert [Path(path).name for path in fetched] == ["dataset.json"]
    with (copy / "val.arrow").open("r+b") as file:
        file.write(b"?")
    stage.stage(str(source), copy)
    assert [Path(path).name for path in fetched[1:]] == ["dataset.json", "val.arrow"]
    assert contents(copy) == contents(source)


def test_a_damaged_catalogue_is_never_renamed_into_place(tmp_path, monkeypatch):
    monkeypatch.setattr(stage.time, "sleep", lambda _: None)
    source = make_images(tmp_path, train=10)
    with (source / "val.arrow").open("r+b") as file:
        file.write(b"?")
    with pytest.raises(
        UserError, match=r"val\.arrow could not be copied.*its checksum is not the one in dataset\.json"
    ):
        stage.stage(str(source), tmp_path / "copy")
    assert not (tmp_path / "copy/val.arrow").exists()
    assert verify(source) == 1


def test_a_vanishing_target_is_not_reported_as_a_missing_source(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(stage.time, "sleep", lambda _: None)
    store, top = stage.open_store(str(clips))
    with pytest.raises(UserError, match=r"train\.arrow could not be copied to .*/gone/train\.arrow"):
        stage.fetch(store, f"{top}/train.arrow", tmp_path / "gone/train.arrow")
