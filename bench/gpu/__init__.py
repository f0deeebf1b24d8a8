"""The acceptance run on a machine with one GPU: `make gpu`."""
