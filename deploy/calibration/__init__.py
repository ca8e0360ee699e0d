"""Choosing bits for each layer of a model: `kvferry calibrate`."""
