"""The model's own traces as a yardstick: what it would write, and how far it has moved from that.

prompts -> replies of the untouched model (sampling.py) -> its top-k log-probabilities on them,
kept on disk (store.py) -> rows (rows.py) -> divergence of the present model (divergence.py)
-> bounds of its mean (bounds.py) -> reading for the guard (yardstick.py)
"""
