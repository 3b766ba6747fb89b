"""The file in a folder that is being packed: the plan, and the lock of the processes that pack it."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TextIO

from pipelines.errors import UserError
from pipelines.files import lock, sync
from tools.shards import PLAN_FILE, PackPlan

UNFINISHED = (".*.tmp-*",)  # the temporary files of writers that were killed
OTHERS = {
    "source_sha256": "another list of source files",
    "class_names": "other class names",
    "class_key": "another --class-key",
}
UNLOCKED = "another process that packs into this folder would not be noticed, so make sure there is none"


@contextmanager
def begin(plan: PackPlan, out: Path, alone: bool) -> Iterator[None]:
    """Write the plan into a new folder, or check that the folder has the same plan; lock the folder.

    A process that packs all shards locks it `alone`; processes that pack parts share the lock.
    """
    out.mkdir(parents=True, exist_ok=True)
    note = out / PLAN_FILE
    if any(out.iterdir()) and not note.exists():  # checked last: another part may be creating it
        raise UserError(f"--out {out} contains other files; give a new or an empty folder.")
    with note.open("a+") as file:  # NFS locks only files that are open for writing
        _lock(file, alone)
        if os.fstat(file.fileno()).st_size == 0:
            file.write(json.dumps({"packing": plan.settings()}))
            file.flush()
            sync(note)
            _lock(file, alone)  # a part now shares the lock
        file.seek(0)  # on some file systems only this open file may read what it has locked
        check_same(plan, note, out, file.read())
        if alone:
            remove(out, plan.splits, *UNFINISHED)
        yield


def _lock(file: TextIO, alone: bool) -> None:
    """Lock the plan's file: exclusively if `alone` or if it is empty, else shared. Raises `UserError`."""
    for _ in range(1 if alone else 50):  # another part locks it exclusively only while it writes
        shared = not alone and os.fstat(file.fileno()).st_size > 0
        try:
            return lock(file, Path(file.name).parent, UNLOCKED, shared=shared)
        except BlockingIOError:
            time.sleep(0.1)
    raise UserError(f"another process is packing into {Path(file.name).parent}; wait for it or stop it.")


def check_same(plan: PackPlan, noted: Path, delete: Path, text: str = "") -> None:
    """Raise `UserError` unless `text`, by default the content of `noted`, describes this plan.

    delete: what to delete to pack again.
    """
    try:
        # Without locks two parts may both have written the file: the first plan counts.
        then = {**json.JSONDecoder().raw_decode(text or noted.read_text(encoding="utf-8"))[0]["packing"]}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{noted} is not of a packed dataset, or damaged; give another --out, or delete {delete}."
        ) from error
    settings = plan.settings()
    then = {"class_key": ""} | then  # earlier versions recorded less
    if "source_fps" in settings:
        rate = settings["source_fps"] if "av" in settings else then.get("fps", 30.0)
        then = {"fps": 30.0, "source_fps": rate, "max_seconds": 60.0, "clip_seconds": 10.0} | then
    for name, now in settings.items():
        if now == then.get(name) or (name in ("pillow", "torch", "av") and noted.name == "dataset.json"):
            continue  # a finished dataset is valid with any version
        what = OTHERS.get(name, f"{name.replace('_', '-')} {then.get(name, 'unrecorded')}, not {now}")
        if name == "av" and name not in then:
            what = "clips from frames, not from videos"
        raise UserError(
            f"{noted.parent} was packed with {what}; give another --out (with make shards: OUT=FOLDER), "
            f"or delete {delete}."
        )


def remove(out: Path, splits: Iterable[str], *patterns: str) -> None:
    """Remove files that match a pattern from a dataset's folder and the folders of its splits."""
    for folder in (out, *(out / split for split in splits)):
        for leftover in chain(*map(folder.glob, patterns)):
            leftover.unlink(missing_ok=True)
