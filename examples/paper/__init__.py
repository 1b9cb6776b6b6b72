"""The paper's experiment: three networks, two data sets, their losses, training, and what is told of it."""
