"""Convert a dataset of format 2, whose catalogue is Parquet: python -m tools.format3 FOLDER."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from pipelines.dataset import FORMAT_VERSION, SCHEMA, DatasetInfo, check_info, open_split
from pipelines.errors import UserError, first_line, run_cli
from pipelines.files import atomic_text, sha256_of
from tools.shards import write_catalogue


def convert(root: tyro.conf.Positional[Path]) -> None:
    """Convert a dataset of format 2 without decoding; UserError for another format or a damaged one."""
    path = root / "dataset.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the top folder of a packed dataset")
    try:
        info = json.loads(path.read_bytes())
        if info["format"] != FORMAT_VERSION - 1:
            raise UserError(f"{path} has format {info['format']}; only format 2 can be converted")
        recorded = dict(info.get("catalogue_sha256", {}))  # early datasets have none
        check_info(info | {"catalogue_sha256": dict.fromkeys(info["splits"], "0" * 64)})
        for split in info["splits"]:
            old = root / f"{split}.parquet"
            if recorded.get(split, found := sha256_of(old)) != found:
                raise ValueError(f"the checksum of {old.name} is not the one in dataset.json")
            rows = pq.read_table(old, page_checksum_verification=True)
            write_catalogue(root / f"{split}.arrow", rows.cast(SCHEMA))
    except (ValueError, LookupError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
        raise UserError(f"{root} cannot be converted ({first_line(error)}); pack it again") from error
    sums = {split: sha256_of(root / f"{split}.arrow") for split in info["splits"]}
    info |= {"format": FORMAT_VERSION, "catalogue_sha256": sums}
    listed = (info[key] for key in ("splits", "packing", "tar_bytes", "catalogue_sha256"))
    new = DatasetInfo(root, info["kind"], tuple(info["classes"]), *listed)
    for split in new.splits:  # before dataset.json changes: until then the dataset is one of format 2
        samples = len(open_split(new, split))
        print(f"{root / split}.arrow: {samples} samples")
    atomic_text(path, json.dumps(info, indent=1, ensure_ascii=False) + "\n")
    for split in info["splits"]:
        (root / f"{split}.parquet").unlink()
        for cache in root.glob(f".{split}.*.columns"):
            shutil.rmtree(cache)
    print("runs that were trained on this dataset resume with --run.allow data")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(convert, description=__doc__))
