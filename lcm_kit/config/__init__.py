"""Configuration: `schema.py` names every YAML key, `load.py` reads a file and its overrides into it."""
