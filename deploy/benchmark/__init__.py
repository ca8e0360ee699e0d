"""`kvferry bench decode` and `kvferry bench memory`."""
