"""Reading runs, and what to make of them: tables, figures, pages and cost models."""
