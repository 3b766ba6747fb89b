"""File systems without locks, modes or fsync of folders: work continues with one warning."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest
import torch

from models import files as weights_files
from pipelines import files
from pipelines.dataset import open_dataset, read_info
from pipelines.errors import UserError
from tests.tools.test_pack import image_tree, pack_images, sums
from tests.train_helpers import small
from tools import stage
from train import loop, mae, rundir

NO_LOCKS = [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL]


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make flock fail with the error `number`, and chmod and fsync of folders with EPERM."""
    fsync = os.fsync

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    def forbid(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def fsync_files_only(descriptor: int) -> None:
        forbid() if stat.S_ISDIR(os.fstat(descriptor).st_mode) else fsync(descriptor)

    monkeypatch.setattr(fcntl, "flock", fail)
    monkeypatch.setattr(os, "chmod", forbid)
    monkeypatch.setattr(os, "fsync", fsync_files_only)
    files.warn_once.cache_clear()


def test_training_continues_without_locks_and_warns_once(images, tmp_path, monkeypatch, capsys):
    refuse(monkeypatch, errno.ENOTSUP)
    assert loop.fit(small("image-mae-pico", images, tmp_path, "run", epochs=1.0), mae.make_task) == 0
    assert (tmp_path / "run/model.safetensors").exists()
    warned = [line for line in capsys.readouterr().err.splitlines() if "does not support file locks" in line]
    assert len(warned) == 1 and warned[0].startswith(f"warning: the file system of {tmp_path}/run ")


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_run_folder_opens_without_locks(number, images, tmp_path, monkeypatch, capsys):
    refuse(monkeypatch, number)
    config = small("image-mae-pico", images, tmp_path, "run")
    data = rundir.data_identity(read_info(images))
    held, *_ = rundir.enter(config, data)
    rundir.record_start(config, data, {})
    held.close()
    assert "a second training process in this folder would not be noticed" in capsys.readouterr().err


def test_a_run_folder_in_use_and_an_unwritable_one_have_different_errors(images, tmp_path):
    config = small("image-mae-pico", images, tmp_path, "run")
    held = rundir.lock_run(config.run.folder)
    with pytest.raises(UserError, match="another process is training in"):
        rundir.lock_run(config.run.folder)
    held.close()
    (tmp_path / "file").write_text("")
    closed = small("image-mae-pico", images, tmp_path / "file", "run")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        rundir.lock_run(closed.run.folder)


def test_permission_denied_on_locking_means_that_another_machine_has_the_lock(images, tmp_path, monkeypatch):
    refuse(monkeypatch, errno.EACCES)
    with pytest.raises(UserError, match="another process is training in"):
        rundir.lock_run(tmp_path / "run")


@pytest.mark.parametrize("number", NO_LOCKS)
def test_packing_continues_without_locks_and_writes_the_same_bytes(number, tmp_path, monkeypatch, capsys):
    source = image_tree(tmp_path / "source", train=2, val=1)
    assert pack_images(source, tmp_path / "calm") == 0
    refuse(monkeypatch, number)
    for part in ("1/2", "2/2", ""):
        assert pack_images(source, tmp_path / "out", shard_range=part) == 0
    assert sums(tmp_path / "out") == sums(tmp_path / "calm")
    printed = capsys.readouterr().err
    assert printed.count("does not support file locks") == 1 and str(tmp_path / "out") in printed


def test_without_locks_two_parts_may_write_the_same_plan(tmp_path, monkeypatch):
    source = image_tree(tmp_path / "source", train=2, val=1)
    refuse(monkeypatch, errno.ENOLCK)
    assert pack_images(source, tmp_path / "out", shard_range="1/2") == 0
    with (tmp_path / "out/.plan.json").open("a") as note:
        note.write((tmp_path / "out/.plan.json").read_text())  # as if the other part also wrote it
    assert pack_images(source, tmp_path / "out") == 0


def test_staging_continues_without_locks(images, tmp_path, monkeypatch, capsys):
    refuse(monkeypatch, errno.ENOSYS)
    stage.stage(str(images), tmp_path / "copy")
    assert len(open_dataset(tmp_path / "copy", "train")) == 40
    assert "run one stage command at a time" in capsys.readouterr().err


def test_weights_are_found_without_locks(tmp_path, monkeypatch):
    refuse(monkeypatch, errno.ENOTSUP)
    name = weights_files.official_names()[0]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / f"{name.split(':')[0]}.pth"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    assert weights_files.fetch(name) == path


def test_disk_errors_are_not_ignored(tmp_path, monkeypatch):
    for number in (errno.EIO, errno.ENOSPC):

        def fail(_: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            files.atomic_text(tmp_path / "a.txt", "one")
        assert not (tmp_path / "a.txt").exists()


def test_files_can_be_written_to_a_folder_without_read_permission(tmp_path, monkeypatch):
    opened = os.open

    def closed(path: os.PathLike, *rest: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", closed)
    files.atomic_text(tmp_path / "a.txt", "one")
    assert (tmp_path / "a.txt").read_text() == "one"


def test_a_file_system_without_rename_gives_one_line(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"cannot rename files .*; choose a folder on another file system"):
        files.atomic_text(tmp_path / "a.txt", "one")
    assert not [*tmp_path.iterdir()]
