"""The catalogue of a packed dataset: what every shard holds, and where in it each frame lies."""

import pyarrow as pa

FORMAT_VERSION = 1

# One row per source sample of a split, the rejected ones too; written by tools/shards.py.
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),  # -1: unlabelled
        ("class_name", pa.string()),
        ("source", pa.string()),  # path below the source folder
        ("status", pa.string()),  # "ok" or "rejected"
        ("reason", pa.string()),  # why it was rejected, else ""
        ("change", pa.string()),  # "copied", or what was done to make it readable
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("frames", pa.int32()),
        ("shard", pa.int32()),  # -1: rejected
        ("offsets", pa.list_(pa.int64())),  # byte offset of every frame's JPEG in its tar
        ("sizes", pa.list_(pa.int32())),  # its length in bytes
        ("sha256", pa.string()),  # over the frames' bytes in order
    ]
)
