"""What is minimised: a language model's loss, or the distance from a teacher's vectors."""
