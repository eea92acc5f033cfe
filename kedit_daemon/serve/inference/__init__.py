"""Generation for readers: a replica of the model, batched decoding, streams of tokens."""
