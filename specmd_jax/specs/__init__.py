"""What is known of models, machines and cache sizes: numbers with units, and where they come from."""
