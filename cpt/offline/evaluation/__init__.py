"""What an export can do: tasks from a YAML, scored by this project's own small scorer or by
lm-evaluation-harness, and compared with the scores of the model before training."""
