"""The laboratory: recipes, experiments, the store of finished runs, and what is measured on them."""
