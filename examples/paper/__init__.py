"""The experiment of the IAL paper: networks, data sets, losses, training and reports."""
