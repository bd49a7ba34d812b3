"""Every measurement of speed; `jobs.bench` calls them."""
