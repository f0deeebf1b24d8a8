"""Parts of the guard's proof, `bench/prove/guard.py`."""
