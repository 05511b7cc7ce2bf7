"""Page templates of the report, read as package resources."""
