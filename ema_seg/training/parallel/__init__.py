"""Training on several devices: strategies, sharding, synchronised batch norm, the largest batch that fits."""
