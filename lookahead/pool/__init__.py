"""n-grams that outlive a request: see `Pool`."""
