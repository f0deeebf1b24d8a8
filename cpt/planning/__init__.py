"""What a run will take, computed before there is a machine: memory, bytes on the wire, time, and
the best layout.

hardware.py  what the GPUs, links and hosts can do, and how much of it is counted on
flops.py     floating-point operations of one token
traffic.py   bytes on the wire by kind, inside a node and between nodes
estimate.py  memory (cpt/planning/memory.py) + traffic + FLOPs -> time by resource, bottleneck,
tokens/s/GPU
search.py    all valid layouts -> the fastest one that fits
table.py     figure.py command.py   for people
"""
