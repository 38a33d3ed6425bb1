"""What makes token vectors."""
