"""The operating system: disk space, locks, sd_notify, logging, safe text, times."""
