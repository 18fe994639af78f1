"""What numbers are rounded to before they are multiplied, and how sums are kept."""
