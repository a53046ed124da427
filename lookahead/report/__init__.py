"""A run as one HTML page, to step through pass by pass: see `page`."""
