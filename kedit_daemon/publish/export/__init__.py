"""Export formats: merged and delta checkpoints, LoRA adapters, live facts."""
