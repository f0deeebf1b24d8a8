"""Parts of bench/experts.py."""
