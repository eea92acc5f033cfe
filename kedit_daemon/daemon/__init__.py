"""The long-running process: its loop, requests, scheduled jobs, and pauses for a full disk."""
