"""The output layer: which outputs compete (those of the task, those seen so far, or all), and its upkeep."""
