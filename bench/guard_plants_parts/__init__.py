"""Parts of bench/guard_plants.py: the simulated runs, the contenders, and the figure."""
