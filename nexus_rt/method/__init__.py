"""The method, readable without the rest: the loop, the blend, guidance."""
