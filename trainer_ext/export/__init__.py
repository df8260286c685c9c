"""Turns a trained adapter into weights that need no adapter."""
