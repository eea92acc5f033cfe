"""Takes facts in: the inbox, file formats, record schemas, submission and waiting."""
