"""Parts of bench/step.py."""
