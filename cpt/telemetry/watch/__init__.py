"""`cpt watch`: all runs of a folder on live pages that only read."""
