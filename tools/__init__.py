"""Command-line tools around training: demo data, packing, checking, plotting, benchmarks."""
