"""Read weights: safetensors and PyTorch files, shards with an index, folders. Code in a file never runs."""

import argparse
import json
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from models.errors import ModelError
from models.factory import CONFIGS
from models.formats import State

IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "best.safetensors",
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = ("model_state", "model_state_dict", "state_dict", "model", "module")
NESTING = 4  # wrappers within wrappers, at most
WEB_PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml")
HEADER_LIMIT = 100_000_000  # bytes; the safetensors format has this limit
TRANSFORMERS_HEADS = 16  # decoder heads of a transformers config that does not mention them


@dataclass(frozen=True)
class Weights:
    """What was read, and what the file and its folder say about it."""

    path: Path
    state: State  # by the names of the file
    note: str = ""  # which of several state dicts was taken
    classes: tuple[str, ...] = ()  # class names of the head's outputs; empty if unknown
    decoder_heads: int = 0  # 0 if unknown: shapes do not depend on it


def read_weights(path: Path) -> Weights:
    """Read a weights file, a sharded file's index, or the weights in a folder, to the CPU.

    Raises ModelError if there are none, if a file holds anything but tensors, or if it is damaged.
    """
    path = find_weights(path)
    content = _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)
    state, note = unwrap(content, str(path))
    return Weights(path, state, note, classes_of(path), decoder_heads_of(path))


def find_weights(path: Path) -> Path:
    """The weights file that a path means: itself, or the one in a folder.

    In a folder the first of IN_FOLDERS is taken, else the only file with one of SUFFIXES. Raises ModelError.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ModelError(f"no weights file at {path}; check the path")
        return path
    for name in IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise ModelError(f"no weights file in {path}; it needs one of {', '.join(IN_FOLDERS)}")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"{path} has several weights files ({names}); name one of them")
    return found[0]


def unwrap(content: object, label: str) -> tuple[State, str]:
    """The state dict in a file's content, and a note if a moving average was preferred to the plain weights.

    The moving average is preferred as in timm, and as this project's own runs export it. Raises ModelError.
    """
    found = _find_state(content, NESTING)
    if found is None:
        raise ModelError(f"{label} has no state dict of names and tensors; save model.state_dict()")
    return found


def _find_state(content: object, depth: int) -> tuple[State, str] | None:
    if not isinstance(content, dict) or not content or not depth:
        return None
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return content, ""
    inside = ((name, _find_state(content.get(name), depth - 1)) for name in (*AVERAGES, *WRAPPERS))
    found = {name: state for name, state in inside if state is not None}
    if not found:
        return None
    (first, (state, note)), *others = found.items()
    if first in AVERAGES and others:
        also = ", ".join(name for name, _ in others)
        note = f"{first} of the file is taken (the moving average); it also has {also}"
    return state, note


def _read_file(path: Path) -> object:
    """The content of one safetensors or PyTorch file; its first bytes decide which it is."""
    try:
        start = _start_of(path)
        if start[8:9] == b"{" and not start.startswith(b"PK"):
            return _read_safetensors(path)
        return _read_torch(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _start_of(path: Path) -> bytes:
    """A file's first bytes; raises ModelError for what people download or copy by mistake."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ModelError(f"{path} is empty; download or copy it again")
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ModelError(
            f"{path} is a Git LFS pointer and not the weights; run git lfs pull in its repository"
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(WEB_PAGES):
        raise ModelError(
            f"{path} is a web page, such as an error or login page, and not weights; download it again"
        )
    return start


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        header, size = _header(path)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if size + max(ends, default=0) > path.stat().st_size:
            _cut_off(path)
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        _no_weights(path, error)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors header and the bytes before the first tensor; ValueError if it is not one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_LIMIT:
            raise ValueError("the header is too long")
        text = file.read(length)
    if len(text) < length:
        _cut_off(path)
    return json.loads(text), 8 + length


def _read_torch(path: Path) -> object:
    """Load a PyTorch file; of all classes only tensors and argparse.Namespace (timm, mae) are accepted."""
    with path.open("rb") as file:
        if file.read(2) == b"PK" and not zipfile.is_zipfile(path):
            _cut_off(path)
    try:
        # An open file, since torch decides by the suffix of a path.
        with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files raise errors of many kinds
        text = str(error)
        if (
            isinstance(error, EOFError | struct.error | IndexError)
            or "unexpected EOF" in text
            or "was truncated" in text
        ):
            _cut_off(path)
        if found := isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL ([\w.]+\w)", text):
            raise ModelError(
                f"{path} contains more than tensors ({found[1]}) and could run code when it is loaded; "
                "save the state dict alone: torch.save(model.state_dict(), FILE)"
            ) from error
        _no_weights(path, error)


def _cut_off(path: Path) -> NoReturn:
    size = path.stat().st_size
    raise ModelError(f"{path} is cut off after {size} bytes; download or copy it again")


def _no_weights(path: Path, error: Exception) -> NoReturn:
    raise ModelError(
        f"{path} is no weights file, or it is damaged ({type(error).__name__}); "
        "give a PyTorch or safetensors file"
    ) from error


def _read_shards(index: Path) -> State:
    """The tensors that an index names; every shard must be in the index's own folder."""
    _start_of(index)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index} is not an index of weights, or it is damaged; download it again")
    parts: dict[str, State] = {}
    for name in dict.fromkeys(places.values()):
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise ModelError(f"{index} names {name!r} as a shard; every shard must be in its own folder")
        if not index.with_name(name).is_file():
            raise ModelError(f"{name}, a shard of {index}, is missing; download it")
        parts[name] = unwrap(_read_file(index.with_name(name)), str(index.with_name(name)))[0]
    for tensor, name in places.items():
        if tensor not in parts[name]:
            raise ModelError(f"{index.with_name(name)} lacks {tensor}, which its index names; download both")
    return {tensor: parts[name][tensor] for tensor, name in places.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def classes_of(weights: Path) -> tuple[str, ...]:
    """Class names from the same folder: a run's data.json or a transformers config; empty if unknown."""
    names = read_json(weights.with_name("data.json")).get("classes")
    labels = read_json(weights.with_name("config.json")).get("id2label")
    if not names and isinstance(labels, dict) and all(number.isdecimal() for number in labels):
        names = [labels[number] for number in sorted(labels, key=int)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    placeholders = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    return () if placeholders else tuple(names)


def decoder_heads_of(weights: Path) -> int:
    """Decoder heads by the file's own metadata, else by the config.json in its folder; 0 if unknown."""
    config = read_json(weights.with_name("config.json"))
    about = _about(weights)
    if "decoder_heads" not in about:
        if config.get("model_type") == "hiera":
            heads = config.get("decoder_num_heads", TRANSFORMERS_HEADS)
            return heads if isinstance(heads, int) else 0
        if config.get("kind") != "mae":
            return 0
        model = config.get("model")
        name = model.get("name") if isinstance(model, dict) else ""
        about = {"model": name, "decoder_heads": config.get("decoder_heads")}
    known = CONFIGS.get(str(about.get("model")).removeprefix("mae_"))
    heads = about["decoder_heads"] or (known.decoder_heads if known else 0)  # 0: the model's own
    return heads if isinstance(heads, int) else 0


def _about(weights: Path) -> dict[str, Any]:
    """What this project's export wrote into a safetensors file; empty for other files."""
    if weights.suffix != ".safetensors":
        return {}
    try:
        values = json.loads(_header(weights)[0]["__metadata__"]["hiera-train"])
    except (OSError, ValueError, LookupError, TypeError):  # also ModelError
        return {}
    return values if isinstance(values, dict) else {}
