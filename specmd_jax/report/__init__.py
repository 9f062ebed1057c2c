"""Tables, figures and pages, made from result folders alone; nothing here imports JAX."""
