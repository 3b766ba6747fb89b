"""The data path: catalogue and memory-mapped shards -> sampler -> DALI graph -> torch tensors."""
