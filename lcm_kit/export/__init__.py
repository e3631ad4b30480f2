"""LoRA files: written for every app, held against each app's own rules, read, mended and merged.

`run.py` exports a run; `verify.py` answers for a file; `convert.py` mends one; `merge_files.py` merges some.
"""
