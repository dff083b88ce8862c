"""One clip on several GPUs: every process runs the same call, and they share its work.

torchrun --nproc-per-node 4 -m nexus_rt.cli generate "..." --parallel cfg=2,ulysses=2 ...
"""
