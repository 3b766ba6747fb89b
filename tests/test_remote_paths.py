"""Addresses of object stores and web servers: only tools.stage reads them; other commands say what to do."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.dataset import open_dataset
from pipelines.errors import UserError, check_local, check_words
from tests.tools.test_pack import image_tree, pack_images
from tests.train_helpers import ROOT, module
from tools import stage

ADDRESSES = (
    "s3://b/x",
    "gs://b/x",
    "hf://datasets/a/b",
    "http://h/x",
    "https://h:80/x",
    "s3a://b",
    "az://c/x",
)


def run(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(module(*words), cwd=cwd, env=env, capture_output=True, text=True, check=False)


STAGE = "copy it to a local disk first: a packed dataset with make stage DATA='s3://b/x' TO=FOLDER, "
COPY = "give a local folder, and copy the result there with the store's own program"
COMMANDS = {  # a command with its flag -> what its message has
    "tools.pack all --out s3://b/x": COPY,
    "tools.pack images --source s3://b/x --out out": STAGE,
    "tools.pack clips --videos=s3://b/x --annotations a --out out": STAGE,
    "train.mae image-mae-pico --data.path s3://b/x": STAGE,
    "tools.verify s3://b/x": STAGE,
    "tools.stage data s3://b/x": COPY,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_explains_what_to_do_with_an_address(command: str, tmp_path: Path):
    done = run(*command.split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and "s3://b/x is not a local path; " in done.stderr
    assert COMMANDS[command] in done.stderr
    assert [*tmp_path.iterdir()] == [], "nothing is written"


def test_the_flag_decides_what_an_address_needs():
    """Every command checks its words first; these take seconds to import what they need."""
    for words in ("--model.init s3://b/x", "runs/a --data s3://b/x", "runs/a s3://b/x"):
        with pytest.raises(UserError, match="copy it to a local disk first"):
            check_words(words.split())
    with pytest.raises(UserError, match=COPY):
        check_words(["--run.root", "s3://b/x"])
    with pytest.raises(UserError, match="is not in UTF-8; rename that file or folder"):
        check_words(["--data.path=b\udce4r"])


def test_every_kind_of_address_is_recognized_and_no_path_or_other_word_is():
    for address in ADDRESSES:
        for words in (["--out", address], [f"--out={address}"], ["x", address]):
            with pytest.raises(UserError, match="is not a local path"):
                check_words(words)
        with pytest.raises(UserError, match=address):
            check_local(Path(address))  # a Path keeps one slash; the message has both
    check_words(
        ["/data/s3", "s3", "runs/s3:x", "--ray", "host:6379", "hiera_base_224:mae_in1k", "--a=b", "", "-"]
    )


def test_functions_refuse_addresses_too(tmp_path: Path, monkeypatch):
    source = image_tree(tmp_path / "source", train=1, val=1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--out s3://bucket/out is not a local path; give a local folder"):
        pack_images(source, Path("s3://bucket/out"))
    with pytest.raises(UserError, match="gs://bucket/x is not a local path"):
        open_dataset("gs://bucket/x", "train")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ---- stage ------------------------------------------------------------------------------------------------


class Closed(http.server.BaseHTTPRequestHandler):
    """A store that requires credentials."""

    def do_HEAD(self):
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


def test_missing_credentials_give_one_sentence(tmp_path: Path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Closed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"endpoint_override=127.0.0.1:{server.server_address[1]}&scheme=http&region=us-east-1"
        words = (sys.executable, "-m", "tools.stage", f"s3://bucket/imagenet?{where}", str(tmp_path / "copy"))
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        server.shutdown()
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "bucket/imagenet/dataset.json cannot be read" in done.stderr and "ACCESS_DENIED" in done.stderr
    assert "check the address and the credentials, for s3:// the variables AWS_ACCESS_KEY_ID" in done.stderr
    assert not (tmp_path / "copy").exists()


def test_an_address_that_arrow_cannot_read_is_named_with_those_that_it_can(tmp_path: Path):
    for address in ("hf://datasets/a/b", "https://host/x"):
        with pytest.raises(
            UserError, match=f"{address} cannot be opened.* begins with s3://, gs:// or hdfs://"
        ):
            stage.stage(address, tmp_path / "copy")
