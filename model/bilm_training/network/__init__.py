"""The biLM in the order of work that training needs, with its gradient."""
