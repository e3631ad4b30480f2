"""What `evaluation/speed` is made of: models of random weights, a side of the comparison, measures."""
