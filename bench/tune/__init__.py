"""`nexus-rt tune`: plans searched by measurement, the Pareto front of time and quality."""
