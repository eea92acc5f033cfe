"""The language model: editable weights, caches, decoding, statistics, and canary measurements."""
