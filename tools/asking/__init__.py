"""Training of the encoder that compares questions with facts; offline, not installed."""
