"""Parts of bench/prove/mxfp4.py."""
