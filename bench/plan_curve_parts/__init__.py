"""What bench/plan_curve.py compares the planner with."""
