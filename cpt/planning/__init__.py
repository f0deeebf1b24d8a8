"""The needs of a run, computed before there is a machine: memory, traffic, time, the best layout.

hardware.py      rates of GPUs, links and hosts, and how much of them is counted on
flops.py         floating-point operations of one token
step_work.py     bytes, FLOPs and launches of a micro step by part, from gpu_counts.json
part_times.py    work + attainable rates -> seconds by part
low_precision.py rounding of experts and products in 8 bits: their time and memory
routing.py       how unevenly a run used its experts
memory.py        memory of one rank; step_memory.py: the peaks of a step
traffic.py       bytes on the wire by kind, inside a node and between nodes
estimate.py      memory + traffic + parts -> time by resource, bottleneck, tokens/s/GPU
one_gpu.py       the estimate of a few layers on one GPU
search.py        all valid layouts -> the fastest one that fits
table.py         a plan as text; figure.py: as a figure
mix_probe.py     what probe runs leave; mix_probe_check.py: whether they can be compared
mix_curve.py     probes -> curves of every domain over the share of replay, with their uncertainty
mix_answer.py    curves -> the share of the main language; mix_curve_drawing.py: as a figure
"""
