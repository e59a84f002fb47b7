"""Data that ships with the package; see NOTICE for sources and licences."""
