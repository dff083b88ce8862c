"""Measurements of the runtime, installed as `nexus_rt.bench`; the runtime itself never imports
them."""
