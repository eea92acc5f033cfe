"""The demo: the main job run end to end on the shipped model."""
