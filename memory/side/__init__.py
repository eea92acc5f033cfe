"""The side memory: shards, the FAISS index, and subject matching."""
