"""Converters: pure maps from the tensors of published checkpoints to modules of this package, strict both ways."""
