"""Reproduce the paper: declare (spec), train (arm, cohort, run), store (store), report (report)."""
