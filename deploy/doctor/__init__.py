"""`kvferry doctor`: what would run on this machine, and what would go wrong. It changes nothing."""
