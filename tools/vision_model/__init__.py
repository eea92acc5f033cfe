"""Training of the shipped vision model."""
