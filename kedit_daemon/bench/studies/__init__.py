"""Studies: one question each, in several parts, over a stream of facts."""
