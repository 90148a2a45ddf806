"""Measurements: speed, memory and results, each written to `benchmarks/results/`. Imports the methods; nothing imports it."""
