"""Where engines are exported from, installed as `nexus_rt.export`; the runtime itself never imports
it."""
