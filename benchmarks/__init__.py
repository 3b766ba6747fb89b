"""Speed, side by side with peers; `python -m tools.bench` runs them."""
