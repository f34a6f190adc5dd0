"""Benchmarks and launch counting: ``python -m cute_fmha.bench`` and ``.bench.profile``."""
