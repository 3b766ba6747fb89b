"""Find and read weights: files, shards with an index, folders, and the authors' weights by name.

Code in a file never runs. Official names are such as `mae_hiera_base_16x224:mae_k400`; their files are
downloaded once into torch's hub cache, with their SHA-256 in a second file.
"""

import argparse
import json
import pickle
import re
import shutil
import struct
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.formats import State, check_stored, unwrap
from models.zoo import CONFIGS, PUBLISHED
from pipelines.errors import UserError
from pipelines.files import atomic_text, atomic_write, check_pickle, lock, sha256_of

URL = "https://dl.fbaipublicfiles.com/hiera"
LICENSE = "weights by Meta Platforms under CC BY-NC 4.0: not for commercial use"
ATTEMPTS, TIMEOUT = 4, 30.0  # of a download; seconds without data

IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "best.safetensors",
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
WEB_PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml")
# What torch and safetensors say of a file that is cut off.
SHORT = re.compile("unexpected EOF|was truncated|not fully covered|invalid header length|header too small")
TRANSFORMERS_HEADS = 16  # transformers' default number of decoder heads


@dataclass(frozen=True)
class Weights:
    """Weights, and the facts that their file and its folder contain."""

    path: Path
    state: State  # with the file's own parameter names
    note: str = ""  # which of several state dicts was chosen
    classes: tuple[str, ...] = ()  # class names of the head's outputs; empty if unknown
    decoder_heads: int = 0  # 0 if unknown; the shapes do not show it


def read_weights(source: str | Path) -> Weights:
    """Read a weights file, a sharded file's index, the weights in a folder, or official weights, to the CPU.

    Raises UserError if there are no weights, or if a file is damaged or has other objects than tensors.
    """
    path = find_weights(path_of(str(source)))
    state, note = (_read_shards(path), "") if path.name.endswith(".index.json") else _read_state(path)
    return Weights(path, state, note, classes_of(path), decoder_heads_of(path))


# ---- official weights ------------------------------------------------------------------------------------


def official_names() -> list[str]:
    """All official names, `MODEL:CHECKPOINT`; a classifier's checkpoint includes its finetuning."""
    image = [f"hiera_{size}_224" for size in PUBLISHED]
    video = [f"hiera_{size}_16x224" for size, (_, clip_top1) in PUBLISHED.items() if clip_top1]
    return [
        *(f"{name}:mae_in1k_ft_in1k" for name in image),
        *(f"{name}:mae_k400_ft_k400" for name in video),
        *(f"mae_{name}:mae_in1k" for name in image),
        *(f"mae_{name}:mae_k400" for name in video),
    ]


def is_official(source: str) -> bool:
    """Whether `source` has the form of an official name rather than of a path."""
    return source.startswith(("hiera_", "mae_hiera_")) and ":" in source


def path_of(source: str) -> Path:
    """The file or folder of a path or an official name; downloads official weights on first use.

    Raises UserError if a path does not exist and its name resembles an official one.
    """
    if is_official(source):
        return fetch(source)
    path = Path(source)
    if not path.exists():
        for name in official_names():
            if name.split(":")[0] == path.name.removesuffix(".pth"):
                raise UserError(f"there is no weights file at {path}; the authors' weights are called {name}")
    return path


def fetch(name: str, url: str = "", wait: float = 2.0) -> Path:
    """The local file of an official name, downloaded on first use; prints its license.

    wait: seconds before the first retry; each further wait is twice as long.
    Raises UserError for an unknown name, a failed download or a file that changed after its download.
    """
    if name not in official_names():
        raise UserError(f"there are no official weights {name!r}; known: {', '.join(official_names())}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name.split(':')[0]}.pth"
    checksum = path.with_suffix(".pth.sha256")
    if not (path.is_file() and checksum.is_file() and checksum.stat().st_size):
        path.parent.mkdir(parents=True, exist_ok=True)
        with checksum.open("a") as held:  # the first of a run's processes downloads, the others wait
            lock(held, path.parent, "several processes may download the same file", wait=True)
            if not path.is_file():
                _download(f"{url or URL}/{path.name}", path, wait)
            if not checksum.stat().st_size:
                atomic_text(checksum, sha256_of(path) + "\n")
    if checksum.read_text().strip() != sha256_of(path):
        raise UserError(f"{path} has changed since its download; delete it and {checksum.name}, then retry")
    print(f"{name}: {LICENSE}")
    return path


def _download(url: str, path: Path, wait: float) -> None:
    """Download with retries. torch.hub's function has no timeout and accepts files that are cut off."""
    from rich.console import Console
    from rich.progress import wrap_file

    for attempt in range(ATTEMPTS):
        try:
            with (
                atomic_write(path) as part,
                urllib.request.urlopen(url, timeout=TIMEOUT) as reply,
                part.open("wb") as file,
            ):
                size = int(reply.headers.get("Content-Length") or 0)
                with wrap_file(reply, size, description=path.name, console=Console(stderr=True)) as source:
                    shutil.copyfileobj(source, file)
                if size and file.tell() != size:
                    raise OSError(f"the connection broke after {file.tell()} of {size} bytes")
            return
        except OSError as error:
            reason = error
            if isinstance(error, urllib.error.HTTPError) and error.code in (403, 404):
                break
            if attempt + 1 < ATTEMPTS:
                time.sleep(wait * 2**attempt)
    raise UserError(f"cannot download {url} ({reason}); download it elsewhere and put it at {path}")


# ---- files -----------------------------------------------------------------------------------------------


def find_weights(path: Path) -> Path:
    """The weights file at a path: the file itself, or one in the folder.

    In a folder this is the first of IN_FOLDERS, else the only file with one of SUFFIXES. Raises UserError.
    """
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"there is no weights file at {path}; check the path")
        return path
    for name in IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise UserError(f"there is no weights file in {path}; it needs one of {', '.join(IN_FOLDERS)}")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{path} has several weights files ({names}); name one of them")
    return found[0]


def _read_state(path: Path) -> tuple[State, str]:
    """The state dict of one file, and which of several it is."""
    state, note = unwrap(_read_file(path), str(path))
    check_stored(state, path)
    return state, note


def _read_file(path: Path) -> object:
    """The content of one safetensors or PyTorch file; its first bytes decide which it is.

    A PyTorch file may contain tensors, plain values and argparse.Namespace, which timm and mae save.
    """
    from safetensors.torch import load_file

    try:
        start = _start_of(path)
        zipped = start.startswith(b"PK")
        if start[8:9] == b"{" and not zipped:
            return load_file(path)
        if zipped and not zipfile.is_zipfile(path):  # its directory is at the end
            raise EOFError
        check_pickle(path)
        # Torch would decide by the suffix of a path, so it gets an open file.
        with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # damaged files raise errors of many kinds
        raise UserError(f"{path} {_explain(path, error)}") from error


def _start_of(path: Path) -> bytes:
    """The first bytes of a file. Raises UserError for files that are often saved in place of weights."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise UserError(f"{path} is empty; download or copy it again")
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(
            f"{path} is a Git LFS pointer and not the weights; run git lfs pull in its repository"
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(WEB_PAGES):
        raise UserError(f"{path} is a web page, such as an error or login page; download the weights again")
    return start


def _explain(path: Path, error: Exception) -> str:
    """The problem with a file that could not be read, and what to do about it."""
    text = str(error)
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror}); check its permissions"
    if SHORT.search(text) or isinstance(error, EOFError | struct.error | IndexError):
        return f"is cut off after {path.stat().st_size} bytes; download or copy it again"
    if found := isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL ([\w.]+\w)", text):
        return (
            f"contains more than tensors ({found[1]}) and could run code when it is loaded; "
            "save only the state dict: torch.save(model.state_dict(), FILE)"
        )
    kind = type(error).__name__
    return f"is not a weights file, or it is damaged ({kind}); give a PyTorch or safetensors file"


def _read_shards(index: Path) -> State:
    """The tensors in an index. Raises UserError unless all shards are in the index's own folder."""
    _start_of(index)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index} is not an index of weights, or it is damaged; download it again")
    parts: dict[str, State] = {}
    for name in places.values():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise UserError(f"{index} names {name!r} as a shard; every shard must be in its own folder")
    for name in dict.fromkeys(places.values()):
        if not index.with_name(name).is_file():
            raise UserError(f"{name}, a shard of {index}, is missing; download it")
        parts[name] = _read_state(index.with_name(name))[0]
    for tensor, name in places.items():
        if tensor not in parts[name]:
            raise UserError(f"{index.with_name(name)} lacks {tensor}, which its index names; download both")
    return {tensor: parts[name][tensor] for tensor, name in places.items()}


# ---- facts in the same folder ----------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def classes_of(weights: Path) -> tuple[str, ...]:
    """Class names from a run's data.json or a transformers config.json; empty if unknown."""
    names = read_json(weights.with_name("data.json")).get("classes")
    labels = read_json(weights.with_name("config.json")).get("id2label")
    if not names and isinstance(labels, dict) and all(n.isdecimal() and len(n) < 10 for n in labels):
        names = [labels[number] for number in sorted(labels, key=int)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    placeholders = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    return () if placeholders else tuple(names)


def decoder_heads_of(weights: Path) -> int:
    """Decoder heads from the metadata of an export or from config.json; 0 if unknown."""
    config, facts = read_json(weights.with_name("config.json")), _metadata(weights)
    if "decoder_heads" not in facts:
        if config.get("model_type") == "hiera":
            facts = {"decoder_heads": config.get("decoder_num_heads", TRANSFORMERS_HEADS)}
        elif config.get("kind") == "mae" and isinstance(config.get("model"), dict):
            facts = {"model": config["model"].get("name"), "decoder_heads": config.get("decoder_heads")}
        else:
            return 0
    known = CONFIGS.get(str(facts.get("model")).removeprefix("mae_"))
    heads = facts["decoder_heads"] or (known.decoder_heads if known else 0)  # 0: the model's own number
    return heads if isinstance(heads, int) else 0


def _metadata(weights: Path) -> dict[str, Any]:
    """The metadata that this project writes into exported safetensors files; empty for other files."""
    from safetensors import SafetensorError, safe_open

    if weights.suffix != ".safetensors":
        return {}
    try:
        with safe_open(weights, "pt") as file:
            values = json.loads((file.metadata() or {})["hiera-train"])
    except (SafetensorError, OSError, ValueError, LookupError):
        return {}
    return values if isinstance(values, dict) else {}
