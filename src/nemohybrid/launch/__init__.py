"""Scripts that start a run on one machine or many: checked here, rendered from `templates/`, handed to whoever starts them."""
