"""Analysis of a trained model: what its attention blocks do, without training anything."""
