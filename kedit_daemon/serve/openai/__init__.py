"""OpenAI-compatible endpoints: requests parsed, answers shaped."""
