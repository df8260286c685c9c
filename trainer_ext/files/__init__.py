"""Files that are read and written without a model."""
