"""From a run to files for the apps: `run.py` exports, `card.py` writes the model card beside them."""
