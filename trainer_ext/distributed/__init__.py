"""Who else takes part in a run: processes, engines, and what each process holds."""
