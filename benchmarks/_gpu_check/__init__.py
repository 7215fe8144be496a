"""The parts of gpu_check.py: each module measures or compares one thing, in a process of its own."""
