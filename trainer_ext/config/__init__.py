"""SpftConfig: the fields of an adapter, and the checks of their values."""
