"""What bench/gpu_check.py runs in its processes: one module for each op, and what they share."""
