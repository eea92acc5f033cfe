"""Hands the edited model to other engines: exports, and live reloads of vLLM."""
