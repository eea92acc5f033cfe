"""Read-only output: status, warnings, tables and exports of the log."""
