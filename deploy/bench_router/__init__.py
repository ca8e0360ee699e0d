"""`kvferry bench router`: the routing policies compared, on real workers or, labelled so, on simulated ones."""
