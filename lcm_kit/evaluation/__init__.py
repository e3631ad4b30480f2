"""Evaluations: cells drawn from the same noise, what is measured on them, verdicts and recommendations."""
