"""Measurements: speed, memory and results, kept in `benchmarks/results/`. May import everything; nothing imports it."""
