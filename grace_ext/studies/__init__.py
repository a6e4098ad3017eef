"""Trains the same task with each of several specs, on simulated ranks, to compare them. `grace-ext compare` runs it; it needs torch."""
