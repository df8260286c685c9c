"""Runs batches through a model and feeds an importance metric."""
