"""The edited model, to be carried away: files for other engines, each with what it holds."""
