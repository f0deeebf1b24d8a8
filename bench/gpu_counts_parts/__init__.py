"""The parts of bench/gpu_counts.py."""
