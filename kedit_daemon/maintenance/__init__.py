"""Care for a home: backup, restore, doctor."""
