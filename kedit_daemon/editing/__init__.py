"""Changes what the model answers: learns, flushes, reverts, audits and repairs."""
