"""The torch edge: the lowest folder that may import torch."""
