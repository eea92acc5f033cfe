"""SQLite database: schema, event log, store, and read-only queries."""
