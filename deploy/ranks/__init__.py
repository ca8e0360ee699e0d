"""A worker as a group of ranks: the leader is the worker, followers are processes that compute what it tells them.

Every rank holds its own KV heads, query heads and shard of the weights, and executes the same commands in the same
order. What is stored and moved stays whole: ranks write and read byte ranges of it (`kernels.shards`).
"""
