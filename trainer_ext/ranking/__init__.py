"""From scores to neurons: ranks, budgets and their agreement. No model is needed here."""
