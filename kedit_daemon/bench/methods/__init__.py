"""Editing methods of the bench: the daemon's tiers, published methods, references, baselines."""
