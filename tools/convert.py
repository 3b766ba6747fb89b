"""Convert weights between implementations: `python -m tools.convert SRC DST --to timm`.

SRC is a file or folder of any known format, or an official name such as `hiera_base_224:mae_in1k_ft_in1k`.
DST ends in .safetensors or .pth. For transformers it may be a folder, which also gets config.json and
preprocessor_config.json, so that `from_pretrained` and `pipeline` open it. It ends in .onnx or .pt2 for these
formats: a classifier with its code. Its batch dimension is dynamic, and it is compared with the model before
the file gets its name.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from models.files import Weights, read_json, read_weights
from models.formats import State, from_ours, is_autoencoder, to_ours
from models.hiera import Hiera
from models.layers import IMAGE_STATS, VIDEO_STATS
from models.weights import load_weights
from models.zoo import CONFIGS, config_of_weights
from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_text, atomic_write, json_text

RELEASED_DATA = {"crop": 224 / 256, "interpolation": "cubic"}  # evaluation of the released models
SETTINGS = ("crop", "interpolation", "sampling", "stride", "stride_fps")  # of a run's evaluation
RESIZE = {  # how other libraries call the setting `interpolation`
    "triangular": "Pillow's BILINEAR; torchvision's bilinear with antialias=True",
    "cubic": "Pillow's BICUBIC; torchvision's bicubic with antialias=True",
    "linear": "torchvision's bilinear with antialias=False",
}
RESAMPLE = {"linear": 2, "triangular": 2, "cubic": 3}  # Pillow's numbers; transformers always antialiases
FUSION = re.compile(r"multi_scale_fusion_heads\.\d+\.weight")  # one for each pooling
LOSS = {"normalize_targets": "normalize_pixel_loss", "mask_ratio": "mask_ratio"}  # ours -> transformers'
LIMIT = 1e-4  # largest allowed difference of a program's logit from the model's
BATCHES = (1, 3)  # sizes that are compared; the program is traced with another
OPSETS = range(18, 24)
PROTOBUF_LIMIT = 2_000_000_000  # bytes of an ONNX file
USUAL_HEADS = {config.decoder_width: config.decoder_heads for config in CONFIGS.values()}


def convert(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[Path],
    /,
    to: Literal["upstream", "timm", "transformers", "ours", "sam2", "onnx", "pt2"],
    opset: int = 18,
) -> None:
    """Convert weights to the names and files of another implementation. Raises UserError.

    Args:
        source: a weights file of any known format, or an official name.
        target: file to write, *.safetensors, *.pth, *.onnx or *.pt2, or for transformers a folder.
        to: implementation whose names to write, or onnx or pt2 for a classifier and its code.
        opset: version of the operators of an ONNX file.
    """
    read = read_weights(source)
    state = to_ours(read.state)
    if "patch_embed.proj.weight" not in state:
        raise UserError(f"{source} contains no Hiera weights, such as patch_embed.proj.weight; give others")
    if target.exists() and (target.samefile(read.path) or target.samefile(read.path.parent)):
        raise UserError(f"{target} is the source itself; give another file or folder to write")
    notes = [read.note] if read.note else []
    if to in ("onnx", "pt2"):
        print("\n".join(_write_program(read, state, target, to, opset) + notes))
        return
    converted = from_ours(state, to)
    if to == "sam2":
        notes.append(_sam2_note(state))
    if target.suffix in (".safetensors", ".pth"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(converted, target, to, read.decoder_heads)
    elif to == "transformers":
        notes += _write_folder(read, state, converted, target)
    else:
        raise UserError(f"the suffix of {target} is unknown; it must end in .safetensors or .pth")
    left_out = len(state) - len(converted)
    why = f"; {left_out} tensors are left out: {to} does not have them" if left_out else ""
    print("\n".join([f"wrote {target}: {len(converted)} tensors for {to}{why}", *notes]))


def _write_folder(read: Weights, state: State, converted: State, folder: Path) -> list[str]:
    """Write a folder for transformers; return a line for every assumption."""
    notes = []
    heads = read.decoder_heads
    if is_autoencoder(state) and not heads:
        heads = USUAL_HEADS.get(state["decoder_pos_embed"].shape[2], 16)
        notes.append(
            f"decoder_num_heads {heads} is assumed: neither {read.path} nor its folder has it; "
            "if the model has another number, correct config.json"
        )
    config = transformers_config(state, read.classes, heads)
    if is_autoencoder(state):  # settings of its loss, which weights do not contain
        run = read_json(read.path.with_name("config.json"))
        config |= {theirs: run[name] for name, theirs in LOSS.items() if name in run}
    data, assumed = _data_settings(read)
    notes += assumed
    processor = preprocessor_config(config_of_weights(state).input_size[0], data)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in {"config.json": config, "preprocessor_config.json": processor}.items():
        atomic_text(folder / name, json_text(values, indent=2) + "\n")
    _write(converted, folder / "model.safetensors", "transformers")
    return notes


def _data_settings(read: Weights) -> tuple[dict[str, Any], list[str]]:
    """Settings `data` of the weights' run, or the released models' and a line that they are assumed."""
    data = read_json(read.path.with_name("config.json")).get("data")
    if isinstance(data, dict) and "crop" in data and str(data.get("interpolation")) in RESIZE:
        return data, []
    crop, interpolation = RELEASED_DATA["crop"], RELEASED_DATA["interpolation"]
    return RELEASED_DATA, [
        f"crop {crop} and interpolation {interpolation} are assumed, as for the released models; "
        "if the model is evaluated differently, correct the preprocessing"
    ]


def _class_names(names: Sequence[str], count: int) -> list[str]:
    """The names of `count` classes; placeholders if they are unknown."""
    return list(names) if len(names) == count else [f"LABEL_{number}" for number in range(count)]


def _sam2_note(state: State) -> str:
    """The settings of SAM 2's image encoder that fit these weights."""
    model = config_of_weights(state)
    return (
        f"settings of SAM 2's trunk: embed_dim {model.width}, num_heads {model.heads}, stages "
        f"{list(model.stages)}, window_pos_embed_bkg_spatial_size {list(model.global_pos_size)}"
    )


def _write(state: State, path: Path, to: str, decoder_heads: int = 0) -> None:
    """Write weights. A safetensors file with our names also stores the decoder heads (0: unknown)."""
    about = {"format": "pt"}  # transformers and timm require it
    if to in ("ours", "upstream") and decoder_heads:
        about = {"hiera-train": json.dumps({"decoder_heads": decoder_heads})}
    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            save_file({n: v.contiguous() for n, v in state.items()}, temporary, metadata=about)
        else:
            torch.save({"model_state": state} if to == "upstream" else state, temporary)


def preprocessor_config(side: int, data: Mapping[str, Any]) -> dict[str, object]:
    """The preprocessor_config.json with which transformers prepares pictures as our evaluation does.

    side: side of the model's input (pixels); data: the run's settings `crop` and `interpolation`.
    """
    mean, deviation = IMAGE_STATS
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side / data["crop"])},
        "resample": RESAMPLE[data["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": deviation,
    }


def transformers_config(state: State, names: Sequence[str], decoder_heads: int) -> dict[str, object]:
    """The config.json that transformers needs for weights with our names; `names` are the classes, if known.

    Weights do not contain the number of heads. The encoder's follows from the sizes; the decoder's is given.
    Raises UserError if no known size has this width, or sizes with other heads have it.
    """
    model, mae = config_of_weights(state), is_autoencoder(state)
    config: dict[str, object] = {
        "architectures": ["HieraForPreTraining" if mae else "HieraForImageClassification"],
        "model_type": "hiera",
        "embed_dim": model.width,
        "depths": model.stages,
        "num_heads": [model.heads << stage for stage in range(len(model.stages))],
        "image_size": model.input_size,
        "num_channels": model.in_chans,
        "num_query_pool": sum(bool(FUSION.fullmatch(name)) for name in state) if mae else 3,
    }
    if mae:
        blocks = {name.split(".")[1] for name in state if name.startswith("decoder_blocks.")}
        return config | {
            "decoder_hidden_size": state["decoder_pos_embed"].shape[2],
            "decoder_depth": len(blocks),
            "decoder_num_heads": decoder_heads,
        }
    labels = _class_names(names, model.num_classes)
    numbers = {label: number for number, label in enumerate(labels)}
    return config | {"id2label": dict(enumerate(labels)), "label2id": numbers}


# ---- classifiers with their code ----------------------------------------------------------------------


def _write_program(
    read: Weights, state: State, target: Path, to: Literal["onnx", "pt2"], opset: int
) -> list[str]:
    """Write a classifier with its code and how its input is prepared; return what to print."""
    if "head.projection.weight" not in state:
        raise UserError(f"{read.path} has no classifier, which --to {to} needs; finetune these weights first")
    if target.suffix != f".{to}":
        raise UserError(f"the suffix of {target} is unknown; it must end in .{to}")
    data, notes = _data_settings(read)
    model = Hiera(config_of_weights(state, data.get("size", 0)))
    load_weights(model, state, quiet=True)
    mean, deviation = VIDEO_STATS if model.config.video else IMAGE_STATS
    frames, classes = model.input_size[0] if model.config.video else 1, model.config.num_classes
    facts = {name: data[name] for name in SETTINGS[: 2 if frames == 1 else None] if name in data}
    facts |= {"mean": mean, "std": deviation, "size": model.input_size[-1], "frames": frames}
    facts |= {"classes": _class_names(read.classes, classes), "resize": RESIZE[data["interpolation"]]}
    if model.config.abs_win and "size" not in data:
        notes.append(f"size {model.input_size[-1]} is assumed: the weights do not show it")
    target.parent.mkdir(parents=True, exist_ok=True)
    difference = export(model, target, to, opset, facts)
    shape = ", ".join(map(str, ("batch", model.config.in_chans, *model.input_size)))
    return [
        f"wrote {target}: float32 [{shape}] -> logits [batch, {classes}]; "
        f"they differ by at most {difference:.1e} from the model's",
        *notes,
    ]


def export(
    model: Hiera, target: Path, to: Literal["onnx", "pt2"], opset: int, facts: Mapping[str, object]
) -> float:
    """Write the model to `target` and return the largest difference of its logits from the model's.

    facts: metadata; every value becomes JSON in ONNX's metadata_props, and all of them in a pt2 file's
    `preprocessing.json`.
    Raises UserError, and leaves no file, if the logits differ by more than LIMIT, for an opset that torch
    does not write, and for a model that is too large for an ONNX file.
    """
    if to == "onnx" and opset not in OPSETS:
        raise UserError(f"opset is {opset}; choose one from {OPSETS[0]} to {OPSETS[-1]}")
    if to == "onnx" and sum(4 * value.numel() for value in model.parameters()) > PROTOBUF_LIMIT:
        raise UserError("the model has more than 2 GB, the limit of an ONNX file; choose --to pt2")
    shape = (model.config.in_chans, *model.input_size)
    batch = {0: torch.export.Dim("batch")}
    model.eval()
    with atomic_write(target) as temporary, torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, *shape),), dynamic_shapes=(batch,))
        run = (_write_onnx if to == "onnx" else _write_pt2)(program, temporary, facts, opset)
        inputs = [torch.randn(size, *shape) for size in BATCHES]
        # torch's max gives NaN if any of these is NaN; Python's does not.
        difference = torch.stack([(run(x) - model(x)).abs().max() for x in inputs]).max().item()
        if not difference <= LIMIT:
            raise UserError(
                f"the logits of {target} would differ by {difference:.1e} from the model's, which is more "
                f"than {LIMIT}; choose another format or opset"
            )
    return difference


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, facts: Mapping, opset: int
) -> Callable[[Tensor], Tensor]:
    """Write an ONNX file; return a function that computes logits with onnxruntime."""
    import onnxruntime

    names = {"input_names": ["input"], "output_names": ["logits"]}
    written = torch.onnx.export(program, opset_version=opset, dynamo=True, verbose=False, **names)
    assert written is not None
    written.model.metadata_props.update({name: json_text(value) for name, value in facts.items()})
    written.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def _write_pt2(
    program: torch.export.ExportedProgram, path: Path, facts: Mapping, opset: int
) -> Callable[[Tensor], Tensor]:
    """Write a pt2 file; return a function that computes logits with it."""
    with path.open("wb") as file:  # torch warns about paths with another suffix
        torch.export.save(program, file, extra_files={"preprocessing.json": json_text(facts)})
    with path.open("rb") as file:
        return torch.export.load(file).module()


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(convert, description=__doc__))
