"""A guidance sweep: cells on the same noise, what is measured on them, and what follows."""
