"""`lcm-kit plan`: what a run will need, told from its config; no weights are loaded.

`base_profile.py` finds out which base it is; `dry_run.py` runs a training step on torch's meta device and
books what it holds (`tracker.py`) and computes; `estimate.py` adds the weights, `advice.py` says what to
change, `show.py` prints; `probe.py` makes two real steps. docs/plan.md tells how good the estimates are.
"""
