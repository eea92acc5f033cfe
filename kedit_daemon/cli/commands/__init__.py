"""The commands, in groups: each parses, calls one function, and prints."""
