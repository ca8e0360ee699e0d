"""`kvferry bench serve`: load on a running gateway, measured at the client."""
