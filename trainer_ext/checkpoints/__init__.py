"""Saving and resuming under any engine."""
