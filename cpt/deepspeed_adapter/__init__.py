"""Everything that touches the inside of DeepSpeed, one concern a file, behind a version check."""
