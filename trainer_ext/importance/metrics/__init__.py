"""Importance metrics, one file a family."""
