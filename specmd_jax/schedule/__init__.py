"""From a trace to visits: which experts each pass demands at each layer, in what order (CONTRACT.md section 1)."""
