"""Blocks to tokens: the paged pool of packed blocks and the decode loop over it."""
