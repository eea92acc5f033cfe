"""Decides what a text asks: which relation of a subject, and whether that is a fact's own."""
