"""Ends a run with a message that names the process that died, hangs or differs."""
