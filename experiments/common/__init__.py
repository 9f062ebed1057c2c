"""What several commands share: their options, several processes, training, and the rows of larger tables."""
