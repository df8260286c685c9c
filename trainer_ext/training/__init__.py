"""The callback that carries a run, and the trainers that attach it."""
