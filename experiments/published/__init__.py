"""The protocols of published tables, one module a table; `experiments.reproduce` runs them."""
