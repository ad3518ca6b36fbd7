"""Checks: pure functions that return findings. Pre-flight, the training loop and `xded doctor` share them."""
