"""Language model: editable weights, caches, decoding, scoring, statistics, canary measurements."""
