"""The data path: catalogue and shards -> sampler -> DALI graph -> torch tensors."""
