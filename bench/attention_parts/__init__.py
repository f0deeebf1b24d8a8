"""Parts of bench/attention.py."""
