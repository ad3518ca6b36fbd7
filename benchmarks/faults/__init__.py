"""Planted faults and healthy variants, and whether the doctor tells them apart: `python benchmarks/faults`."""
