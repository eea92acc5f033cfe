"""Side memory: shards, the FAISS index, and subject matching."""
