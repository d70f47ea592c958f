"""Measurements of the layer beside its peers; run from the repository's root, as `python -m benchmarks.layer`."""
