"""Export formats: merged and delta checkpoints, LoRA adapters, GGUF files, live facts."""
