"""The analyses of both papers: gradients, loss landscape, ages of entries, sweeps of runs; each says what it saw."""
