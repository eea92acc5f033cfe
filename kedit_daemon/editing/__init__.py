"""Changes what the model says: learns, flushes, reverts, audits and repairs."""
