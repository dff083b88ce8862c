"""The GPU suite: everything there is to measure on a GPU, in one run (`suite`)."""
