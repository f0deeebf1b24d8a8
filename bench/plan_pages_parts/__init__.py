"""The parts of bench/plan_pages.py."""
