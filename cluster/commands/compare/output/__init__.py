"""What a comparison writes: table, plots and page."""
