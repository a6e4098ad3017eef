"""Whole trainings in one process, which compare specs on the same task. `grace-ext compare` runs them; they need torch."""
