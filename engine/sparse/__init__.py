"""Sparse deltas over frozen weights: which entries are trained, their gradients, their values, their write-back."""
