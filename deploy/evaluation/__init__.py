"""What quantizing the cache costs in answers: `kvferry eval`."""
