"""Offline tools for developers; not installed."""
