"""Which prefill worker and which decode worker serve a request: one interface, three policies."""
