"""`kvferry prefix`: computed prefixes as files, and from node to node."""
