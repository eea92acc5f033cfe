"""State of the daemon: facts and their history, the model's weights, the side memory."""
