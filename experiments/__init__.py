"""What pages of docs/ cite as evidence: `python -m experiments.NAME`."""
