"""report.html: what the log of a run says, on one page."""
