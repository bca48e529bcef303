"""Where rows come from, and which rows are the same task."""
