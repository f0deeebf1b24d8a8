"""Tasks from a YAML, scored on an export and compared with the model before training.

Tasks from local files have a small scorer of their own; others run in lm-evaluation-harness.
"""
